"""Benchmarks: stock and relay measured in one run, results kept as rows."""
