"""Clients of other servers: OpenAI's list of models, Text Embeddings Inference, vLLM and Hugging Face's client."""

from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any, ClassVar

import anyio
import httpx
import numpy as np
import pytest
from anyio import to_thread
from anyio.lowlevel import checkpoint
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from pydantic import BaseModel
from starlette.types import Message, Receive, Scope, Send

from modalkit.pipelines import InferenceOutputModel
from modalkit.service.local_gateway import LocalGateway
from modalkit.service.settings import ADAPTERS, Adapter, Settings
from modalkit.service.validation import validated
from modalkit.service.web import create_app
from modalkit.service.web.adapters import tasks
from modalkit.service.web.admission import FREE_BYTES, SLICE_ITEMS
from modalkit.testing import client_of
from tests.support.http_client import assert_problem
from tests.support.http_server import serving
from tests.support.task_pipelines import LIMIT, AllTasksPipeline

pytestmark = pytest.mark.anyio

ENTRIES = {
    "lengths": {"pipeline": "tests.support.length_model:LengthPipeline"},
    "all": {"pipeline": "tests.support.task_pipelines:AllTasksPipeline"},
}


def make_settings(**entries: Any) -> Settings:
    return Settings(
        _config_files=[],
        app_settings={"async_config": {"store": "memory"}, "batch_config": {"calibration": {"enabled": False}}},
        model_settings={"model_entries": entries},
    )


class LooseAnswer(InferenceOutputModel):
    scores: Any
    embedding: Any
    score: Any


class NumbersPipeline(AllTasksPipeline):
    """Answers with numbers of NumPy, of which JSON lacks one, and the text ``object`` with what is no JSON."""

    output_model: ClassVar[type[InferenceOutputModel]] = LooseAnswer

    def run_inference(self, input_list: list[BaseModel]) -> list[InferenceOutputModel]:
        half, nan = np.float32(0.5), np.float32("nan")
        return [
            LooseAnswer(scores={"a": object()}, embedding=[object()], score=object())
            if getattr(item, "text", "") == "object"
            else LooseAnswer(scores={"a": half, "b": nan}, embedding=np.array([half, nan]), score=nan)
            for item in input_list
        ]


@pytest.fixture(scope="module")
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with LocalGateway(make_settings(**ENTRIES)) as gateway:
        await gateway.wait_until_ready()
        async with serving(create_app(gateway, owns_gateway=False)) as opened:
            yield opened


async def test_hugging_faces_client_classifies_and_embeds(client: httpx.AsyncClient) -> None:
    ask = InferenceClient(model=str(client.base_url)).text_classification
    ask_by_path = InferenceClient(model=f"{client.base_url}/predict").text_classification
    for method in (ask, ask_by_path):
        labels = await to_thread.run_sync(method, "WHAt")
        assert [(label.label, label.score) for label in labels] == [("loud", 0.75), ("quiet", 0.25)]
    (best,) = await to_thread.run_sync(partial(ask, "what", top_k=1))
    assert (best.label, best.score) == ("quiet", 1)
    embed = InferenceClient(model=f"{client.base_url}/embed").feature_extraction
    vectors = await to_thread.run_sync(embed, ["one two", "three"])
    assert vectors.tolist() == [[7, 2], [5, 1]]
    vectors = await to_thread.run_sync(partial(embed, "two a b", normalize=True))
    assert vectors.tolist() == [pytest.approx([7 / 58**0.5, 3 / 58**0.5])]
    with pytest.raises(HfHubHTTPError, match="422"):
        await to_thread.run_sync(partial(ask, "what", function_to_apply="none"))


async def test_hugging_faces_client_classifies_by_the_bundled_model() -> None:
    entry = {"pipeline": "modalkit.pipelines.sentiment:SentimentPipeline", "engine": "torch"}
    async with LocalGateway(make_settings(sentiment=entry)) as gateway:
        await gateway.wait_until_ready()
        async with serving(create_app(gateway, owns_gateway=False)) as client:
            ask = InferenceClient(model=str(client.base_url)).text_classification
            labels = await to_thread.run_sync(ask, "What a lovely day!")
            answer = (await client.post("/sync/predict", json={"text": "What a lovely day!", "scores": True})).json()
            bare = (await client.post("/sync/predict", json={"text": "What a lovely day!"})).json()
    assert [label.label for label in labels] == sorted(answer["scores"], key=answer["scores"].get, reverse=True)
    assert sum(label.score for label in labels) == pytest.approx(1)
    assert (answer["sentiment"], answer["confidence"]) == (labels[0].label, labels[0].score)
    assert "scores" not in bare


@pytest.mark.parametrize(
    ("path", "body", "answer"),
    [
        ("/predict", {"inputs": "ABCd"}, [{"label": "loud", "score": 0.75}, {"label": "quiet", "score": 0.25}]),
        ("/predict", {"inputs": ["a"]}, [{"label": "quiet", "score": 1}, {"label": "loud", "score": 0}]),
        (
            "/predict",
            {"inputs": [["a"], ["B"]], "truncate": True},
            [
                [{"label": "quiet", "score": 1}, {"label": "loud", "score": 0}],
                [{"label": "loud", "score": 1}, {"label": "quiet", "score": 0}],
            ],
        ),
        ("/embed", {"inputs": "one two"}, [[7, 2]]),
        (
            "/rerank",
            {"query": "b c", "texts": ["a", "b c", "c"], "return_text": True},
            [
                {"index": 1, "score": 2, "text": "b c"},
                {"index": 2, "score": 1, "text": "c"},
                {"index": 0, "score": 0, "text": "a"},
            ],
        ),
        (
            "/rerank",
            {"query": "b", "texts": ["a", "b"], "raw_scores": False},
            [{"index": 1, "score": 1}, {"index": 0, "score": 0}],
        ),
    ],
)
async def test_text_embeddings_inference(client: httpx.AsyncClient, path: str, body: Any, answer: Any) -> None:
    response = await client.post(path, json=body)
    assert (response.status_code, response.json()) == (200, answer)


async def test_vllms_classification(client: httpx.AsyncClient) -> None:
    answer = (await client.post("/classify", json={"model": "all", "input": ["AB", "ab"], "user": "me"})).json()
    assert answer.pop("id").startswith("classify-")
    assert answer.pop("created") > 0
    assert answer == {
        "object": "list",
        "model": "all",
        "data": [
            {"index": 0, "label": "loud", "probs": [1, 0], "num_classes": 2},
            {"index": 1, "label": "quiet", "probs": [0, 1], "num_classes": 2},
        ],
        "usage": {"prompt_tokens": 0, "total_tokens": 0, "completion_tokens": 0},
    }
    assert len((await client.post("/classify", json={"input": "one"})).json()["data"]) == 1


async def test_openais_list_of_models(client: httpx.AsyncClient) -> None:
    answer = (await client.get("/v1/models")).json()
    assert answer["object"] == "list"
    assert [model["id"] for model in answer["data"]] == ["lengths", "all"]
    model = (await client.get("/v1/models/all")).json()
    assert model.pop("created") > 0
    assert model == {"id": "all", "object": "model", "owned_by": "modalkit"}
    assert_problem(await client.get("/v1/models/no/such"), 404)


@pytest.mark.parametrize(
    ("path", "body", "status", "detail"),
    [
        ("/predict", {"inputs": ["a", "b"]}, 422, "inputs: texts in one list are a pair, which"),
        ("/predict", {"inputs": []}, 422, "inputs"),
        ("/predict", {"inputs": "a", "raw_scores": True}, 422, "raw_scores"),
        ("/predict", {"inputs": "x" * (LIMIT + 1), "truncate": False}, 413, "truncate"),
        (
            "/predict?model_name=lengths",
            {"inputs": "a"},
            422,
            "'lengths' does not fit text classification; those that do: all",
        ),
        ("/classify", {"model": "gpt", "input": "a"}, 404, "there is no model 'gpt'; configured are: lengths, all"),
        ("/classify", {"input": [1, 2]}, 422, "input"),
        ("/embed", {"inputs": "a", "normalize": False}, 422, "normalize"),
        ("/embed", {"inputs": "a", "dimensions": 8}, 422, "dimensions: unknown field"),
        ("/rerank", {"query": "a", "texts": []}, 422, "texts"),
    ],
)
async def test_what_cannot_be_done_is_refused(
    client: httpx.AsyncClient, path: str, body: Any, status: int, detail: str
) -> None:
    assert detail in assert_problem(await client.post(path, json=body), status)["detail"]


@pytest.mark.parametrize(
    ("path", "body"),
    [("/embed", {"inputs": [1]}), ("/rerank", {"query": "a", "texts": [1]}), ("/classify", {"input": [1]})],
)
async def test_of_many_wrong_texts_the_first_is_explained(
    client: httpx.AsyncClient, path: str, body: dict[str, Any]
) -> None:
    """To find what is wrong with each of very many texts delayed other clients."""
    one = assert_problem(await client.post(path, json=body), 422)
    many = {key: value * 4 if isinstance(value, list) else value for key, value in body.items()}
    explained = assert_problem(await client.post(path, json=many), 422)["errors"]
    assert [error["field"] for error in explained] == [error["field"] for error in one["errors"]]


async def test_outputs_are_written_for_clients_of_other_servers_as_for_ours() -> None:
    """NumPy's numbers as those of JSON, what JSON lacks as null, and what is no JSON is the pipeline's error."""
    asked: list[tuple[str, dict[str, Any], Any]] = [
        (
            "/predict",
            {"inputs": "a", "parameters": {}},
            [[{"label": "a", "score": 0.5}, {"label": "b", "score": None}]],
        ),
        ("/embed", {"inputs": "a"}, [[0.5, None]]),
        ("/embed", {"inputs": "a", "normalize": True}, [[None, None]]),
        ("/rerank", {"query": "a", "texts": ["a"]}, [{"index": 0, "score": None}]),
    ]
    failing: list[tuple[str, dict[str, Any]]] = [
        ("/predict", {"inputs": "object"}),
        ("/embed", {"inputs": "object"}),
        ("/rerank", {"query": "a", "texts": ["object"]}),
    ]
    entry = {"pipeline": f"{__name__}:NumbersPipeline"}
    async with client_of(LocalGateway(make_settings(numbers=entry))) as client:
        for path, body, answer in asked:
            response = await client.post(path, json=body)
            assert (response.status_code, response.json()) == (200, answer), path
        for path, body in failing:
            problem = assert_problem(await client.post(path, json=body), 500)
            assert problem["type"] == "urn:problem-type:modalkit:output-not-json", path


async def test_others_have_their_turn_while_many_texts_are_validated(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns, seen = 0, set[int]()

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await checkpoint()

    def noted(model: type[BaseModel], value: object) -> BaseModel:
        seen.add(turns)
        return validated(model, value)

    monkeypatch.setattr(tasks, "validated", noted)
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(count_turns)
        answer = await client.post("/embed", json={"inputs": ["a"] * (SLICE_ITEMS + 1)})
        task_group.cancel_scope.cancel()
    assert len(answer.json()) == SLICE_ITEMS + 1
    assert len(seen) > 1


@pytest.mark.parametrize(("path", "key"), [("/predict", "inputs"), ("/classify", "input")])
async def test_a_large_answer_counts_as_held_while_it_is_sent(path: str, key: str) -> None:
    texts = ["a"] * 2000
    async with LocalGateway(make_settings(**ENTRIES)) as gateway:
        await gateway.wait_until_ready()
        app, held = create_app(gateway, owns_gateway=False), list[bool]()
        transport = httpx.ASGITransport(app)

        async def watched(scope: Scope, receive: Receive, send: Send) -> None:
            async def watching(message: Message) -> None:
                if message["type"] == "http.response.body":
                    async with httpx.AsyncClient(transport=transport, base_url="http://a") as other:
                        held.append("modalkit_held_body_bytes 0.0" not in (await other.get("/metrics")).text)
                await send(message)

            await app(scope, receive, watching)

        async with httpx.AsyncClient(transport=httpx.ASGITransport(watched), base_url="http://a", timeout=60) as client:
            answer = await client.post(path, json={key: [[text] for text in texts] if path == "/predict" else texts})
    assert (answer.status_code, len(answer.content) > FREE_BYTES) == (200, True)
    assert all(held)


async def test_an_adapter_has_no_routes_without_a_model_that_fits_and_none_when_it_is_switched_off() -> None:
    cases: list[tuple[str, Sequence[Adapter], set[str]]] = [
        ("lengths", ADAPTERS, {"/v1/models", "/v1/models/{model}"}),
        ("all", ["tei"], {"/predict", "/embed", "/rerank"}),
        ("all", [], set()),
    ]
    for entry, adapters, paths in cases:
        app = create_app(LocalGateway(make_settings(**{entry: ENTRIES[entry]})), adapters=adapters)
        others = {"/predict", "/embed", "/rerank", "/classify", "/v1/models", "/v1/models/{model}"}
        assert others & app.openapi()["paths"].keys() == paths


async def test_health_is_readiness(client: httpx.AsyncClient) -> None:
    assert (await client.get("/health")).json() == (await client.get("/health/ready")).json()
