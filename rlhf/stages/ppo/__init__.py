"""Reinforcement learning against a reward."""
