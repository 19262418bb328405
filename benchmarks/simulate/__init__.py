"""Drives the scheduler's own queue and policy with a virtual clock, beside the rules of other batchers."""
