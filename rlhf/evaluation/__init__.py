"""What measures a policy or a reward model."""
