"""The items that are sent: of a file, of the corpus, of a mix of lengths, or made up for the model."""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from modalkit.benchmarks.corpus import mixed_length_texts
from modalkit.benchmarks.load import BenchError, OptionError
from modalkit.benchmarks.load.spawned import first_received, spawned
from modalkit.pipelines import InferencePipeline
from modalkit.service.calls.wire_format import json_form
from modalkit.service.cli.common import model_source
from modalkit.service.cli.records import FileFormat, InputError, read_file
from modalkit.service.errors import ServiceError, describe_with_line
from modalkit.service.made_up_items import make_up_items
from modalkit.service.settings import Settings

TEXT = "text"
MIX_ITEMS = 1000
SAMPLES_OF_A_SIZE = 32
SAMPLE_SIZES = (8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Items, where they are from, and the label of each if they have one."""

    items: Sequence[Mapping[str, Any]]
    source: str
    labels: Sequence[str] | None = None


def file_inputs(path: Path, file_format: FileFormat | None, column: str | None, label: str | None) -> Inputs:
    """The items of a text, JSON lines, CSV or Parquet file: the text of `column`, else all columns but the `label`.

    Raises `InputError` and ``OSError``; for a line that is no item too, since it would be sent.
    """
    items, labels = [], []
    for record in read_file(path, file_format, None, None):
        row, place = record.columns, f"{path}, {record.place}"
        if record.error is not None or not row:
            raise InputError(f"{place}: {record.error or 'an item must be a text or a JSON object'}")
        for what, name in (("label", label), ("column", column)):
            if name is not None and name not in row:
                raise InputError(f"{place} has no {what} {name!r}; it has {', '.join(row)}")
        if label is not None:
            labels.append(str(row[label]))
        items.append({TEXT: row[column]} if column is not None else {name: row[name] for name in row if name != label})
    if not items:
        raise InputError(f"{path} holds no items: put one on each line")
    return Inputs(items, str(path), labels if label is not None else None)


def corpus_inputs() -> Inputs:
    """The texts of mixed lengths."""
    return Inputs([{TEXT: text} for text in mixed_length_texts()], "the corpus of mixed lengths")


def model_inputs(config: Sequence[Path], model: str, mix: str | None, timeout_s: float) -> Inputs:
    """The items that a configured model makes up, of the sizes of `mix` where that is given.

    A process of its own loads the model, so that its memory is free again when it is measured. Raises what loading
    does, `OptionError`, and `BenchError` where it takes longer.
    """
    with spawned(_send_inputs.__module__, _send_inputs.__name__) as (pipe,):
        pipe.send((config, model, mix))
        inputs: Inputs = first_received(pipe, "the model that makes items up", timeout_s)
        return inputs


def _send_inputs(pipe: Connection) -> None:
    config, model, mix = pipe.recv()
    try:
        pipeline = model_source(Settings.load(config or None), model).load()
        pipe.send(sample_inputs(pipeline) if mix is None else mixed_inputs(mix, sized_items(pipeline)))
    except ServiceError as error:
        pipe.send(error)
    except KeyboardInterrupt:
        pass  # the parent ends this process
    except Exception as error:  # noqa: BLE001  # of the user's pipeline; raised again by the parent
        pipe.send(BenchError(f"{model}: sample_items failed: {describe_with_line(error)}; or give --input"))


def mixed_inputs(mix: str, sized: Callable[[int, int], Sequence[Mapping[str, Any]]] | None = None) -> Inputs:
    """Items of given sizes and shares, as ``16:70,256:30``; sizes alone are equally frequent.

    `sized` makes a number of items of a size, in the model's unit; without it, they are texts of so many words.
    Raises `OptionError`.
    """
    try:
        pairs = [part.split(":") for part in mix.split(",")]
        shares = {int(pair[0]): float(pair[1]) if len(pair) > 1 else 1.0 for pair in pairs}
    except ValueError:
        shares = {}
    if not shares or min(shares) < 1 or min(shares.values()) <= 0:
        raise OptionError(f"--length-mix {mix!r}: give sizes and their shares, all above 0, as 16:70,256:30")
    pools = {
        size: itertools.cycle(sized(SAMPLES_OF_A_SIZE, size) if sized else _texts_of_words(size)) for size in shares
    }
    drawn = random.Random(1).choices(list(shares), list(shares.values()), k=MIX_ITEMS)  # noqa: S311  # repeatable
    return Inputs([next(pools[size]) for size in drawn], f"sizes {mix}")


def _texts_of_words(count: int) -> list[Mapping[str, Any]]:
    words = itertools.cycle(" ".join(mixed_length_texts(400)).split())
    return [{TEXT: " ".join(itertools.islice(words, count))} for _ in range(SAMPLES_OF_A_SIZE)]


def sized_items(pipeline: InferencePipeline) -> Callable[[int, int], Sequence[Mapping[str, Any]]]:
    """What makes items of a size by the model's `sample_items`."""

    def make(count: int, size: int) -> Sequence[Mapping[str, Any]]:
        items = pipeline.sample_items(count, size)
        if not items:
            raise OptionError(f"{type(pipeline).__name__} has no sample_items that make items of a size; give --input")
        return [json_form(item) for item in items]

    return make


def sample_inputs(pipeline: InferencePipeline) -> Inputs:
    """Items of many sizes by the model's `sample_items`, else those that its input model's schema allows."""
    samples = [item for size in SAMPLE_SIZES for item in pipeline.sample_items(SAMPLES_OF_A_SIZE, size)]
    if samples:
        random.Random(1).shuffle(samples)  # noqa: S311  # repeatable
        return Inputs([json_form(item) for item in samples], "sample_items of the model")
    return schema_inputs(pipeline.input_model)


def schema_inputs(model: type[BaseModel]) -> Inputs:
    """Items by the examples, defaults and types of a schema. Raises `NoItemsError`."""
    made = make_up_items(model, SAMPLES_OF_A_SIZE)
    return Inputs([json_form(item) for item in made.items], "made up by the schema of the model")


def takes_text_alone(schema: Mapping[str, Any]) -> bool:
    """Whether a text is all that an item needs."""
    properties = schema.get("properties", {})
    return TEXT in properties and set(schema.get("required", ())) <= {TEXT}


def described_model(schema: Mapping[str, Any]) -> type[BaseModel]:
    """A model with the JSON schema that a server publishes."""

    class Described(BaseModel, extra="allow"):
        @classmethod
        def model_json_schema(cls, *_: Any, **__: Any) -> dict[str, Any]:
            return dict(schema)

    return Described
