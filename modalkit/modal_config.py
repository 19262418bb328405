"""What a Modal app is made of, from the configuration."""

from modalkit.service.on_modal.config import ModalConfig

__all__ = ["ModalConfig"]
