"""Steps without a run: benchmarks, the largest micro-batch, what memory a model takes."""
