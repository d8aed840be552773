"""What a run will need in memory and time, from configs alone."""
