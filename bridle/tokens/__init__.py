"""Code streams and what language models eat."""
