"""What is checked before a weight is loaded."""
