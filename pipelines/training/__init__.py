"""Trains and evaluates the bundled sentiment model: ``python -m modalkit.pipelines.training --help``."""
