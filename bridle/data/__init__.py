"""Shards, their index, and the deterministic, resumable stream: knows nothing of models."""
