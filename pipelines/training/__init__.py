"""Trains and evaluates the bundled sentiment model: ``python -m pipelines.training --help``."""
