"""Proximal policy optimisation: tensors, objective, experience, update."""
