"""Phases, the DeepSpeed engine of a phase, the loop, checkpoints and metrics."""
