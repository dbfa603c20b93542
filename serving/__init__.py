"""HTTP: bytes in, codes out."""
