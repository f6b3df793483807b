"""Microbenchmarks of pyarch beside stock PyTorch; run from a clone: ``python -m benchmarks --help``."""
