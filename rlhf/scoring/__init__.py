"""Scorers: what gives a response its score."""
