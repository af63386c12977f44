"""Benchmarks of the data path: `make bench BENCH=data`."""
