"""The reward model's objective."""
