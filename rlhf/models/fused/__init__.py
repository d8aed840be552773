"""Kernels written by hand, each with the check that decides whether it is used."""
