"""The frozen base, its adapters and heads, the roles they play, and the forward passes."""
