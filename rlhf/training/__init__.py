"""The loop of reinforcement learning, and what every training loop has: optimizer, guards, held-out loss."""
