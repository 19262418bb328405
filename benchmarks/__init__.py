"""Benchmarks of throughput and latency, each beside a baseline that is measured in the same run."""
