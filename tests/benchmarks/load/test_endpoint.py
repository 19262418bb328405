"""How items become requests, and answers labels."""

import json
from typing import Any

import pytest

from modalkit.benchmarks.load import PRESETS, BenchError, Endpoint, preset

ITEMS = [{"text": "good"}, {"text": 'bad "é"'}, {"text": "so"}]


def body_of(request: bytes) -> Any:
    head, _, body = request.partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    return json.loads(body)


def test_a_request_is_whole_http() -> None:
    endpoint = Endpoint("http://u:p@host:81/v1/x?y=1", {"inputs": "$text"}, headers={"X-Key": "a"})
    head, _, body = endpoint.requests(ITEMS)[1].partition(b"\r\n\r\n")
    assert head.split(b"\r\n")[0] == b"POST /v1/x?y=1 HTTP/1.1"
    assert {b"Host: host:81", b"X-Key: a", b"Content-Type: application/json"} <= set(head.split(b"\r\n"))
    assert json.loads(body) == {"inputs": 'bad "é"'}


def test_lists_take_the_items_in_turn() -> None:
    requests = Endpoint("http://h/", {"n": "$count", "all": {"$each": ["$text"]}}, list_length=2).requests(ITEMS)
    assert [body_of(request) for request in requests] == [
        {"n": 2, "all": [["good"], ['bad "é"']]},
        {"n": 2, "all": [["so"], ["good"]]},
    ]


def test_a_field_that_an_item_has_not_is_named() -> None:
    with pytest.raises(BenchError, match="an item has no field 'prompt'; it has text"):
        Endpoint("http://h/", {"inputs": "$prompt"}).requests(ITEMS)


def test_a_template_of_one_item_is_refused_for_lists() -> None:
    with pytest.raises(BenchError, match="sends one item, not the 3 of a request"):
        Endpoint("http://h/", {"inputs": "$text"}, list_length=3)


@pytest.mark.parametrize(
    ("kind", "length", "path", "body", "answer", "labels"),
    [
        ("ours", 1, "/sync/predict", {"text": "good"}, {"sentiment": "positive"}, ["positive"]),
        ("ours", 2, "/batch/predict", ITEMS[:2], [{"sentiment": "x"}, {"status": "error"}], ["x", None]),
        ("tei", 1, "/predict", {"inputs": "good"}, [{"label": "a", "score": 1}, {"label": "b"}], ["a"]),
        ("tei", 2, "/predict", {"inputs": [["good"], ['bad "é"']]}, [[{"label": "a"}], [{"label": "b"}]], ["a", "b"]),
        ("tei-embed", 1, "/embed", {"inputs": "good"}, [[0.1]], [None]),
        ("vllm", 1, "/classify", {"input": "good"}, {"data": [{"label": "a"}]}, ["a"]),
        ("litserve", 1, "/predict", {"text": "good"}, {"label": "a"}, ["a"]),
        ("infinity", 1, "/classify", {"input": ["good"], "model": "default"}, {"data": [[{"label": "a"}]]}, ["a"]),
        (
            "kserve",
            2,
            "/v2/models/model/infer",
            {"inputs": [{"name": "text", "shape": [2], "datatype": "BYTES", "data": ["good", 'bad "é"']}]},
            {"outputs": [{"data": ["a", "b"]}]},
            ["a", "b"],
        ),
    ],
)
def test_each_kind_of_server_gets_what_it_takes(
    kind: str, length: int, path: str, body: Any, answer: Any, labels: list[str | None]
) -> None:
    endpoint = preset(kind, "http://host/", list_length=length)
    assert endpoint.url == f"http://host{path}"
    assert body_of(endpoint.requests(ITEMS)[0]) == body
    assert endpoint.labels(json.dumps(answer).encode()) == labels


def test_every_kind_names_a_model() -> None:
    requests = {kind: preset(kind, "http://host", model="mine").requests(ITEMS)[0] for kind in PRESETS}
    assert {kind for kind, request in requests.items() if b"mine" in request} == {"ours", "vllm", "infinity", "kserve"}


def test_lists_for_a_server_that_takes_none_are_refused() -> None:
    with pytest.raises(BenchError, match="one item in a request"):
        preset("litserve", "http://host", list_length=2)


def test_lines_are_in_the_order_of_their_items() -> None:
    endpoint = Endpoint("http://h/", answer="l", list_length=2, content_type="application/x-ndjson")
    assert endpoint.content(ITEMS[:2]).count(b"\n") == 2
    assert endpoint.labels(b'{"index":1,"l":"b"}\n{"index":0,"l":"a"}\n') == ["a", "b"]
    assert endpoint.labels(b"no json") == [None, None]
