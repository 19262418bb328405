"""The page that shows what the service does: its files, and what they are told once a second."""

from modalkit.service.web.ui.routes import add_page

__all__ = ["add_page"]
