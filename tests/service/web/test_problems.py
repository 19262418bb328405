"""Kinds of errors as URIs, and the page that explains them."""

import re
from pathlib import Path

import httpx
import pytest

from modalkit.service.web.problems import PROBLEM_TYPES, TYPE_PREFIX
from tests.support.http_client import assert_problem
from tests.support.length_model import POISON, REJECTED

pytestmark = pytest.mark.anyio

PAGE = Path(__file__).parents[3] / "docs" / "problems.md"


def test_the_page_explains_each_type_of_problem_and_no_other() -> None:
    explained = re.findall(r"^\| `([a-z-]+)` \|", PAGE.read_text(), flags=re.MULTILINE)
    assert sorted(explained) == sorted(PROBLEM_TYPES)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "kind"),
    [
        ("POST", "/sync/predict", b"{", 400, "bad-request"),
        ("POST", "/sync/predict", b"{}", 422, "invalid-request"),
        ("POST", "/sync/predict?model_name=gpt", b'{"text": "a"}', 404, "unknown-model"),
        ("POST", "/sync/predict", f'{{"text": "{POISON}"}}'.encode(), 500, "pipeline-error"),
        ("POST", "/sync/predict", f'{{"text": "{REJECTED}"}}'.encode(), 422, "reject-item"),
        ("POST", "/batch/predict", b"[" + b", ".join([b'{"text": "a"}'] * 101) + b"]", 413, "request-too-large"),
        ("POST", "/async/predict", b'{"message": {"text": "a"}, "success_queue": "x"}', 422, "queue-not-allowed"),
        ("GET", "/jobs/nothing", b"", 404, "unknown-job"),
        ("GET", "/nowhere", b"", 404, "not-found"),
        ("GET", "/sync/predict", b"", 405, "method-not-allowed"),
    ],
)
async def test_a_problem_says_its_type(
    shared_client: httpx.AsyncClient, method: str, path: str, body: bytes, status: int, kind: str
) -> None:
    problem = assert_problem(await shared_client.request(method, path, content=body), status)
    assert problem["type"] == f"{TYPE_PREFIX}{kind}"
    assert problem["title"] == kind.replace("-", " ").capitalize()
