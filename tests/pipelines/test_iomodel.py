"""The models that users build on, used as the documentation uses them."""

import copy
import pickle
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from modalkit.pipelines.errors import MissingFieldError
from modalkit.pipelines.inference_pipeline import InferencePipeline
from modalkit.pipelines.iomodel import (
    AnyInput,
    AsyncInputModel,
    AsyncOutputModel,
    DelayedFailureOutputModel,
    InferenceOutputModel,
    SyncInputModel,
)


class Request(BaseModel):
    text: str


class Response(InferenceOutputModel):
    sentiment: str
    confidence: float


class KeywordPipeline(InferencePipeline):
    """Judges by a word, with no input or output model declared."""

    def preprocess(self, input_list: list[BaseModel]) -> dict[str, Any]:
        return {"texts": [getattr(item, "text", str(item)) for item in input_list]}

    def predict(self, input_list: list[BaseModel], preprocessed_data: dict[str, Any]) -> dict[str, Any]:
        return {"found": [("good" in text, "bad" in text) for text in preprocessed_data["texts"]]}

    def postprocess(self, input_list: list[BaseModel], raw_output: dict[str, Any]) -> list[InferenceOutputModel]:
        names = {(True, False): "positive", (False, True): "negative"}
        return [
            Response(status="success", sentiment=names.get(found, "neutral"), confidence=0.9)
            for found in raw_output["found"]
        ]


def test_a_pipeline_needs_no_more_than_its_three_stages() -> None:
    pipeline = KeywordPipeline("keywords", "models", {"device": "cpu"}, threshold=0.5)
    assert pipeline.model_entry == {"threshold": 0.5}
    results = pipeline.run_inference([Request(text="good"), Request(text="bad"), Request(text="so so")])
    assert [result.model_dump()["sentiment"] for result in results] == ["positive", "negative", "neutral"]
    assert pipeline.item_size(Request(text="good")) == 1
    assert pipeline.sample_items(3, 16) == []
    pipeline.warm_up()
    pipeline.move_to("cuda")
    pipeline.on_volume_reload()


def test_a_pipeline_without_its_stages_cannot_be_made() -> None:
    class Half(InferencePipeline):
        def predict(self, input_list: list[BaseModel], preprocessed_data: dict[str, Any]) -> dict[str, Any]:
            return {}

    with pytest.raises(TypeError, match="Half must define preprocess, postprocess; or run_inference or predict_stream"):
        Half("a", "b", {})
    with pytest.raises(TypeError, match="InferencePipeline must define preprocess, predict, postprocess; or"):
        InferencePipeline("a", "b", {})


@pytest.mark.parametrize(
    ("name", "model", "base"),
    [("input_model", dict, "BaseModel"), ("input_model", "a:Text", "BaseModel"), ("output_model", Request, "Infer")],
)
def test_a_model_of_the_wrong_kind_is_refused_with_its_class(name: str, model: object, base: str) -> None:
    with pytest.raises(TypeError, match=rf"Wrong\.{name} must be a subclass of {base}.*, it is .*{model}"):
        type("Wrong", (InferencePipeline,), {name: model})


def test_a_pipeline_with_run_inference_needs_no_stages() -> None:
    class OneStep(InferencePipeline):
        def run_inference(self, input_list: list[BaseModel]) -> list[InferenceOutputModel]:
            return [InferenceOutputModel()] * len(input_list)

    assert OneStep("a", "b", {}).run_inference([Request(text="a")]) == [InferenceOutputModel()]


def test_requests_refuse_unknown_fields_and_empty_queue_names() -> None:
    with pytest.raises(ValidationError, match="queue"):
        AsyncInputModel.model_validate({"message": {"text": "a"}, "queue": "results"})
    with pytest.raises(ValidationError, match="meta"):
        SyncInputModel.model_validate({"message": {"text": "a"}, "meta": {}})
    with pytest.raises(ValidationError, match="success_queue"):
        AsyncInputModel.model_validate({"message": {"text": "a"}, "success_queue": ""})


@pytest.mark.parametrize("name", ["a\nb", "\x00", "a\u200bb"])
def test_a_queue_name_that_cannot_be_printed_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match=r"failure_queue\n.*unprintable characters"):
        AsyncInputModel(message={}, failure_queue=name)


def test_a_queue_name_may_be_as_long_as_urls_are_and_no_longer() -> None:
    AsyncInputModel(message={}, success_queue="q" * 2048)
    with pytest.raises(ValidationError, match=r"success_queue\n.*at most 2048 characters"):
        AsyncInputModel(message={}, success_queue="q" * 2049)


def test_a_message_may_be_any_object_or_a_model() -> None:
    plain = AsyncInputModel(message={"text": "a"})
    none = dict.fromkeys(("success_queue", "failure_queue", "idempotency_key", "expires_in"))
    assert plain.model_dump() == {"message": {"text": "a"}, "meta": {}, **none}
    assert AsyncInputModel(message=Request(text="a")).model_dump() == plain.model_dump()
    assert SyncInputModel[Request].model_validate({"message": {"text": "a"}}).message == Request(text="a")
    with pytest.raises(ValidationError, match=r"message\.text"):
        AsyncInputModel[Request].model_validate({"message": {}})


def test_an_output_keeps_further_fields() -> None:
    output = InferenceOutputModel.model_validate({"words": 3})
    assert output.model_dump() == {"status": "success", "error": None, "meta": {}, "words": 3}


def test_a_failure_carries_what_was_asked_for() -> None:
    failure = DelayedFailureOutputModel(
        status="error", error="no", original_message=AsyncInputModel(message={"text": "a"}, failure_queue="bad")
    )
    assert failure.model_dump()["original_message"]["failure_queue"] == "bad"
    assert AsyncOutputModel(job_id="7").model_dump() == {"job_id": "7"}


def test_an_item_without_an_input_model_may_have_fields_with_the_names_of_old_methods_of_pydantic() -> None:
    item = AnyInput.model_validate({"copy": 1, "json": "{}", "schema": None, "dict": {"a": 1}})
    values: Any = item
    assert (values.copy, values.json, values.schema, values.dict) == (1, "{}", None, {"a": 1})
    assert getattr(item, "validate", "none") == "none"
    with pytest.raises(MissingFieldError, match="construct: is missing: add it"):
        _ = values.construct
    assert item.model_copy(update={"copy": 2}).model_dump() == {**item.model_dump(), "copy": 2}
    assert pickle.loads(pickle.dumps(item)) == copy.deepcopy(item) == item  # noqa: S301  # its own bytes


def test_a_subclass_may_declare_such_a_field() -> None:
    class Declared(AnyInput):
        copy: int  # type: ignore[assignment]

    item = Declared.model_validate({"copy": 3, "json": 4})
    assert (item.copy, getattr(item, "json", None)) == (3, 4)


def test_sample_items_that_are_no_models_are_refused_with_the_class_they_should_be_of() -> None:
    class Dictionaries(InferencePipeline):
        input_model = Request

        def sample_items(self, n: int, size: int) -> list[BaseModel]:
            return [{"text": "x" * size}] * n  # type: ignore[list-item]  # a mistake of users

        def run_inference(self, input_list: list[BaseModel]) -> list[InferenceOutputModel]:
            return [InferenceOutputModel()] * len(input_list)

    with pytest.raises(TypeError, match="sample_items must return instances of Request, not of dict"):
        Dictionaries().warm_up()


def test_transient_errors_in_a_list_are_refused_before_one_of_them_is_raised() -> None:
    class Listed(InferencePipeline):
        retryable_errors = [ConnectionError]  # type: ignore[assignment]  # noqa: RUF012  # a mistake of users

        def run_inference(self, input_list: list[BaseModel]) -> list[InferenceOutputModel]:
            raise ConnectionError(len(input_list))

    with pytest.raises(TypeError, match=r"Listed\.retryable_errors must be a class of errors, or a tuple of them"):
        Listed()
