"""The items that are sent."""

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from modalkit.benchmarks.bench.inputs import (
    corpus_inputs,
    described_model,
    file_inputs,
    mixed_inputs,
    sample_inputs,
    schema_inputs,
    sized_items,
    takes_text_alone,
)
from modalkit.benchmarks.bench.session import item_schema
from modalkit.pipelines import InferenceOutputModel, InferencePipeline
from modalkit.service.cli.records import InputError
from tests.support.length_model import LengthPipeline


def written(path: Path, text: str) -> Path:
    path.write_text(text, errors="surrogateescape")
    return path


def test_each_format_gives_items_and_labels(tmp_path: Path) -> None:
    lines = written(tmp_path / "a.txt", "one\ntwo\n")
    assert file_inputs(lines, None, None, None).items == [{"text": "one"}, {"text": "two"}]
    rows = written(tmp_path / "a.csv", "review,stars,y\ngood,5,pos\n")
    found = file_inputs(rows, None, None, "y")
    assert (found.items, found.labels) == ([{"review": "good", "stars": "5"}], ["pos"])
    assert file_inputs(rows, None, "review", "y").items == [{"text": "good"}]
    objects = written(tmp_path / "a.jsonl", '{"number": 4, "y": 2}\n"just text"\n')
    assert file_inputs(objects, None, None, None).items == [{"number": 4, "y": 2}, {"text": "just text"}]


@pytest.mark.parametrize(
    ("name", "text", "column", "label", "message"),
    [
        ("a.csv", "t\nx\n", "text", None, "line 2 has no column 'text'; it has t"),
        ("a.csv", "t\nx\n", None, "y", "line 2 has no label 'y'; it has t"),
        ("a.jsonl", "{\n", None, None, "line 1: not JSON"),
        ("a.txt", "one\nbad\udcff\n", None, None, "line 2: text: is not UTF-8"),
        ("a.txt", "", None, None, "holds no items"),
        ("a.xls", "x", None, None, "cannot tell the format"),
    ],
)
def test_what_is_no_input_is_refused(
    tmp_path: Path, name: str, text: str, column: str | None, label: str | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        file_inputs(written(tmp_path / name, text), None, column, label)


def test_a_mix_has_its_sizes_in_their_shares() -> None:
    counts = Counter(len(item["text"].split()) for item in mixed_inputs("3:90,200:10").items)
    assert set(counts) == {3, 200}
    assert 0.85 < counts[3] / counts.total() < 0.95


def test_a_models_own_items_are_sent() -> None:
    pipeline = LengthPipeline()
    made = sized_items(pipeline)(2, 7)
    assert len(made) == 2
    assert sample_inputs(pipeline).source == "sample_items of the model"


class Signal(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)

    signal: Annotated[np.ndarray[Any, Any], BeforeValidator(np.asarray)] = Field(alias="values")


class Signals(InferencePipeline):
    input_model = Signal

    def run_inference(self, input_list: list[Any]) -> list[InferenceOutputModel]:
        return [InferenceOutputModel(total=item.signal.sum()) for item in input_list]

    def sample_items(self, n: int, size: int) -> list[BaseModel]:
        return [Signal.model_validate({"values": [1.0] * size})] * n


def test_a_models_own_items_are_sent_under_their_aliases_with_arrays_as_lists() -> None:
    assert sized_items(Signals())(1, 2) == [{"values": [1.0, 1.0]}]
    assert Signal.model_validate(sample_inputs(Signals()).items[0]).signal[0] == 1.0


def test_a_published_schema_gives_items_for_any_model() -> None:
    schema = {"type": "object", "properties": {"number": {"type": "integer", "minimum": 3}}, "required": ["number"]}
    assert not takes_text_alone(schema)
    assert schema_inputs(described_model(schema)).items[0] == {"number": 3}
    assert takes_text_alone({"properties": {"text": {}, "scores": {}}, "required": ["text"]})


def test_of_several_models_the_items_are_those_of_the_one_that_is_measured() -> None:
    schemas = {"Text": {"properties": {"text": {}}, "required": ["text"]}, "Image": {"properties": {"pixels": {}}}}
    models = [{"$ref": f"#/components/schemas/{name}", "title": name.lower()} for name in schemas]
    content = {"application/json": {"schema": {"anyOf": models}}}
    paths = {"/sync/predict": {"post": {"requestBody": {"content": content}}}}
    document = {"paths": paths, "components": {"schemas": schemas}}
    assert takes_text_alone(item_schema(document, None))
    assert item_schema(document, "image")["properties"] == {"pixels": {}}


def test_the_corpus_is_texts() -> None:
    assert len(corpus_inputs().items) == 4000
