"""Kinds of errors as URIs, and the page that explains them."""

import json
import re
from http import HTTPStatus
from pathlib import Path

import httpx
import pytest

from modalkit.service.web.problems import PROBLEM_TYPES, TYPE_PREFIX, ProblemError, problem_json
from tests.support.http_client import assert_problem
from tests.support.length_model import POISON, REJECTED

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[3]
PAGE, WEB = ROOT / "docs" / "problems.md", ROOT / "service" / "web"


def test_the_page_explains_each_type_of_problem_and_no_other() -> None:
    explained = re.findall(r"^\| `([a-z-]+)` \|", PAGE.read_text(), flags=re.MULTILINE)
    assert sorted(explained) == sorted(PROBLEM_TYPES)


def test_each_status_that_the_service_answers_with_has_a_type() -> None:
    sources = [path for path in WEB.rglob("*.py") if path.name != "problems.py"]
    names = {name for path in sources for name in re.findall(r"HTTPStatus\.([A-Z_]+)", path.read_text())}
    statuses = [status for status in map(HTTPStatus.__getitem__, names) if status >= HTTPStatus.BAD_REQUEST]
    types = {status: json.loads(problem_json(ProblemError(status, "why")))["type"] for status in statuses}
    assert HTTPStatus.LENGTH_REQUIRED in types
    assert [status for status, kind in types.items() if not kind.startswith(TYPE_PREFIX)] == []


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
