"""``modalkit jobs list | show | replay | purge``: see to jobs, by way of a running service or in the store's file."""

from modalkit.service.cli.jobs.commands import app

__all__ = ["app"]
