"""What a run leaves on disk, and what others read of it."""
