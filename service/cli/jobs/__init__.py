"""``modalkit jobs list | show | replay | purge``: jobs of a running service, or in the store's file."""

from modalkit.service.cli.jobs.commands import app

__all__ = ["app"]
