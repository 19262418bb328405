"""The service as a Modal class, and the web endpoints over it."""

from modalkit.service.on_modal.endpoints import create_web_endpoints
from modalkit.service.on_modal.server import ModalServer, ModalWebServer
from modalkit.service.on_modal.service import ModalService

__all__ = ["ModalServer", "ModalService", "ModalWebServer", "create_web_endpoints"]
