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


HANGING = "hang"
HANG_S = 8.0


class Faulty(LengthPipeline):
    """Takes 40 ms for each batch without using the processor, and hangs for 8 s when it meets one text."""

    def predict(self, input_list: Any, preprocessed_data: dict[str, Any]) -> dict[str, Any]:
        time.sleep(HANG_S if HANGING in preprocessed_data["texts"] else 0.04)
        return super().predict(input_list, preprocessed_data)
