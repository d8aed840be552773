"""The algorithms of RL, one module each: what becomes of a batch's rewards, and the loss that moves the policy."""
