"""Codebook statistics and reports: reads model folders and run folders, never DeepSpeed's checkpoints."""
