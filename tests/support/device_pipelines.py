"""Pipelines whose results tell in which process and on which device they were made."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from modalkit.pipelines import InferenceOutputModel, InferencePipeline, RejectItem


class Item(BaseModel):
    """What should happen to it."""

    text: str


class Output(InferenceOutputModel):
    """Where it was made."""

    text: str = ""
    process: int = 0
    device: str = ""


class TooLongError(RejectItem):
    """Its constructor takes other arguments than its message."""

    def __init__(self, length: int, limit: int) -> None:
        super().__init__(f"{length} letters, at most {limit}")
        self.length = length
        self.lock = threading.Lock()  # which cannot go to another process


class Unreadable:
    """Can be pickled, but not read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("no number",)


class WherePipeline(InferencePipeline):
    """Answers with its process; some texts reject, fail, hang, kill, or lose the device."""

    input_model = Item
    output_model = Output
    retryable_errors = ConnectionError
    is_lost = False

    def preprocess(self, input_list: list[Item]) -> dict[str, Any]:  # type: ignore[override]
        for index, item in enumerate(input_list):
            if item.text == "reject":
                raise RejectItem("not this one", index=index)
        texts = [item.text for item in input_list]
        if "remove" in texts:
            del input_list[texts.index("remove")]
        # Something that no pickle could carry: it stays where it is made.
        return {"texts": texts, "local": lambda: None}

    def predict(self, input_list: list[Item], preprocessed_data: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        assert preprocessed_data["local"]() is None
        texts = preprocessed_data["texts"]
        if "busy" in texts:
            raise ConnectionResetError("busy")
        if "late" in texts:
            raise TimeoutError("no answer")
        if "fail" in texts:
            raise ArithmeticError("cannot compute this")
        if "too long" in texts:
            raise TooLongError(8, 4)
        if "hang" in texts:
            time.sleep(60)
        if "lose" in texts and not Path("lost").exists():
            Path("lost").touch()
            self.is_lost = True
        if self.is_lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if "kill" in texts and not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), 9)
        if "die" in texts:
            os.kill(os.getpid(), 9)
        return {"texts": texts}

    def postprocess(self, input_list: list[Item], raw_output: dict[str, Any]) -> list[Any]:  # type: ignore[override]
        instead = {
            "odd": ValueError("odd"),
            "long": TooLongError(4, 3),
            "unreadable": Output(meta={"object": Unreadable()}),
            "lambda": Output(meta={"object": lambda: None}),
        }
        return [
            instead.get(text, Output(text=text, process=os.getpid(), device=self.device_name()))
            for text in raw_output["texts"]
        ]

    def device_name(self) -> str:
        return str(self.common_settings["device"])


class OnlyHerePipeline(WherePipeline):
    """Cannot be constructed on device b."""

    def __init__(self, common_settings: dict[str, Any]) -> None:
        if common_settings["device"] == "b":
            raise RuntimeError("there is no device b")


class BreakablePipeline(WherePipeline):
    """Cannot be constructed while there is a file of the name `broken`."""

    def __init__(self) -> None:
        if Path("broken").exists():
            raise RuntimeError("the device is broken")


class HeldPipeline(WherePipeline):
    """Its constructor waits on device a."""

    began, may_end = threading.Event(), threading.Event()

    def __init__(self, common_settings: dict[str, Any]) -> None:
        if common_settings["device"] == "a":
            self.began.set()
            self.may_end.wait(60)


class AsOnePipeline(InferencePipeline):
    """Runs as one stage."""

    input_model = Item
    output_model = Output

    def run_inference(self, input_list: list[Item]) -> list[Output]:  # type: ignore[override]
        return [Output(text=item.text, process=os.getpid()) for item in input_list]


class PiecesPipeline(InferencePipeline):
    """Yields a piece for each letter; it never ends for an empty text."""

    input_model = Item
    output_model = Output

    def predict_stream(self, input_list: list[Item]) -> Iterator[list[Output]]:  # type: ignore[override]
        for length in range(1, 1 + max(len(item.text) or 10**9 for item in input_list)):
            yield [Output(text=item.text[:length], process=os.getpid()) for item in input_list]


class SortingPipeline(PiecesPipeline):
    """Sorts its list."""

    def predict_stream(self, input_list: list[Item]) -> Iterator[list[Output]]:  # type: ignore[override]
        input_list.sort(key=lambda item: len(item.text))
        yield from super().predict_stream(input_list)


class AsynchronousPipeline(InferencePipeline):
    """Has no device."""

    async def run_inference(self, input_list: list[BaseModel]) -> list[InferenceOutputModel]:
        return [InferenceOutputModel() for _ in input_list]
