"""Models in service: choosing, decoding, batching, reloading. Knows no HTTP."""
