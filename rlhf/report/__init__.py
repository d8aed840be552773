"""What people look at: made from manifests and metrics alone."""
