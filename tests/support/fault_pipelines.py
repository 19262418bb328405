"""Pipelines for services that are to be killed."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from modalkit.pipelines import InferenceOutputModel
from tests.support.length_model import Length, LengthPipeline

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


class Gated(LengthPipeline):
    """Waits, at a text ``gate NAME``, for a file of that name in the working directory; answers with the texts too."""

    def predict(self, input_list: Any, preprocessed_data: dict[str, Any]) -> dict[str, Any]:
        for text in preprocessed_data["texts"]:
            while text.startswith("gate ") and not Path(text.removeprefix("gate ")).exists():
                time.sleep(0.01)
        return super().predict(input_list, preprocessed_data)

    def postprocess(self, input_list: Any, raw_output: dict[str, Any]) -> list[InferenceOutputModel]:
        return [Length(length=len(text), text=text) for text in raw_output["texts"]]
