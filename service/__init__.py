"""The worker around a pipeline, and its frontends: HTTP, command line and Modal."""
