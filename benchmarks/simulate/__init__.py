"""Simulates the scheduler's own planner with a virtual clock, beside the batching rules of other servers."""
