"""Commands that are no stage: plain functions that the command line registers."""
