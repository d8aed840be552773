"""One recipe a stage, each read from top to bottom."""
