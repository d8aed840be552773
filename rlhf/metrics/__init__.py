"""Statistics of an examination, on arrays."""
