"""What the service answers, as configured: `pytest` in this folder runs this test, which loads the model."""

from pathlib import Path

import pytest

from modalkit.testing import client_of

pytestmark = pytest.mark.anyio
CONFIGURATION = Path(__file__).with_name("modalkit.yaml")
ITEM = {"text": "What a lovely day!"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_the_service_answers_as_configured() -> None:
    async with client_of(CONFIGURATION) as client:
        answer = await client.post("/sync/predict", json=ITEM)
        refused = await client.post("/sync/predict", json={})
    assert answer.status_code == 200, answer.text
    assert answer.json()["status"] == "success"
    assert refused.status_code == 422
