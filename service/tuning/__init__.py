"""What ``modalkit tune`` is made of: measuring a pipeline, choosing limits, trying them, and keeping them."""
