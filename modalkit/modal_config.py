"""What a Modal app is made of, from the configuration."""

from service.on_modal.config import ModalConfig

__all__ = ["ModalConfig"]
