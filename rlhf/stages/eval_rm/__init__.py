"""Examination of a reward model."""
