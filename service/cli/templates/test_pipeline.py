"""What the pipeline answers, alone and behind HTTP: `pytest` in this folder runs these tests."""

from pathlib import Path

import pytest
from pipeline import Count, Text, WordCount

from modalkit import Failure, Success
from modalkit.testing import client_of, poisoned, worker_of

pytestmark = pytest.mark.anyio
CONFIGURATION = Path(__file__).with_name("modalkit.yaml")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_words_are_counted() -> None:
    async with worker_of(WordCount) as worker:
        assert await worker.predict(Text(text="one two three")) == Count(words=3)


async def test_keys_of_the_entry_are_arguments() -> None:
    async with worker_of(WordCount, separator=",") as worker:
        assert await worker.predict(Text(text="one,two three")) == Count(words=2)


async def test_an_item_that_fails_fails_alone() -> None:
    async with worker_of(poisoned(WordCount, lambda item: item.text == "bad")) as worker:
        outcomes = await worker.predict_many([Text(text="good"), Text(text="bad")])
    assert [type(outcome) for outcome in outcomes] == [Success, Failure]


async def test_the_service_answers_as_configured() -> None:
    async with client_of(CONFIGURATION) as client:
        answer = await client.post("/sync/predict", json={"text": "one two three"})
        refused = await client.post("/sync/predict", json={"text": ""})
    assert answer.json()["words"] == 3
    assert refused.status_code == 422
