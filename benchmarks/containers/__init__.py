"""Containers of the service class under load: GPU types, batch limits and numbers of callers."""
