"""The device that a model runs on."""

import re

import torch

from modalkit.pipelines.classifier_settings import DEVICE_KEYS, DEVICE_PATTERN
from modalkit.pipelines.errors import ModelLoadError


def choose_device(name: str) -> torch.device:
    """The device of this machine that `name` (auto, cpu, mps, cuda, cuda:N) means.

    Raises `ModelLoadError` for another name, or if this machine or this build of torch has no such device.
    """
    if not re.match(DEVICE_PATTERN, name):
        raise ModelLoadError(f"device {name!r} is not auto, cpu, mps, cuda or cuda:N")
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    device = torch.device(name)
    found = {"cuda": torch.cuda.device_count() if cuda else 0, "mps": int(mps), "cpu": 1}[device.type]
    if (device.index or 0) >= found:
        raise ModelLoadError(
            f"{DEVICE_KEYS}: {name!r} was asked for, but torch {torch.__version__} finds {found} {device.type.upper()} "
            "devices on this machine: set it to auto or cpu, or install a build of torch for the device and its driver"
        )
    return device
