"""The worker around a pipeline, and its doors: HTTP, command line and Modal."""
