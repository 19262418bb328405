"""Pipelines for services that are to be killed."""

import os
import signal
import time
from typing import Any

from tests.support.length_model import LengthPipeline

KILLER = "kill this process"


class Unhurried(LengthPipeline):
    """Takes a few milliseconds for each batch, so that a kill finds something running."""

    def predict(self, input_list: Any, preprocessed_data: dict[str, Any]) -> dict[str, Any]:
        time.sleep(0.005)
        return super().predict(input_list, preprocessed_data)


class Deadly(LengthPipeline):
    """Kills its process when it meets one text, as a crash in native code or the lack of memory would."""

    def predict(self, input_list: Any, preprocessed_data: dict[str, Any]) -> dict[str, Any]:
        if KILLER in preprocessed_data["texts"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().predict(input_list, preprocessed_data)
