"""Everything that a run puts on the disk, and what passes between processes."""
