"""Preferences on a policy's own samples."""
