"""Measurements of throughput and latency, each side by side with what it is compared to."""
