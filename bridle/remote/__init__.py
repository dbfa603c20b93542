"""Places that are not this machine's disk."""
