"""Pure functions on tensors: what is minimised, and what it is made of."""
