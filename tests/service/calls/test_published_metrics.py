"""The metrics of processes that cannot be scraped, through a key-value store: the one in memory, and Modal's."""

import re
from collections.abc import Callable

import anyio
import anyio.lowlevel
import httpx
import pytest

from modalkit.service.calls.engine import KeyValueStore, MemoryKeyValueStore
from modalkit.service.calls.jobs import CallGateway
from modalkit.service.calls.published_metrics import STALE_S, PublishedMetrics
from modalkit.service.jobs import JobStoreError
from modalkit.service.on_modal.engine import ModalKeyValueStore
from modalkit.service.web import create_app
from modalkit.testing import FakeClock
from tests.service.calls.conftest import MODEL, Stand
from tests.support.http_server import serving

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"  # Modal's client runs on asyncio alone


@pytest.fixture(params=["memory", "modal"])
def store(request: pytest.FixtureRequest) -> KeyValueStore:
    if request.param == "memory":
        return MemoryKeyValueStore()
    request.getfixturevalue("modal_server")
    return ModalKeyValueStore("metrics")


async def test_each_process_sees_what_all_have_published_and_its_own_as_it_is_now(store: KeyValueStore) -> None:
    one, two = PublishedMetrics(store, process_id="1"), PublishedMetrics(store, process_id="2")
    await one.publish("old")
    assert await two.with_own("b") == {"1": "old", "2": "b"}
    await one.publish("a")
    await two.publish("b")
    assert await one.with_own("now") == {"1": "now", "2": "b"}


async def test_a_process_that_has_ended_is_forgotten(store: KeyValueStore) -> None:
    clock = FakeClock()
    ended, other = (PublishedMetrics(store, process_id=name, clock=clock) for name in ("ended", "other"))
    await ended.publish("a")
    clock.now += STALE_S
    assert await other.with_own("b") == {"ended": "a", "other": "b"}
    clock.now += 1
    assert await other.with_own("b") == {"other": "b"}
    assert await store.items() == {}


async def test_processes_that_have_ended_cost_the_others_nothing_where_they_cannot_be_forgotten() -> None:
    class KeepsAll(MemoryKeyValueStore):
        async def remove(self, key: str) -> None:
            raise JobStoreError("the store is busy")

    clock, store = FakeClock(), KeepsAll()
    ended, other, own = (PublishedMetrics(store, process_id=name, clock=clock) for name in ("ended", "other", "own"))
    await ended.publish("a")
    clock.now += STALE_S + 1
    await other.publish("b")
    assert await own.with_own("c") == {"other": "b", "own": "c"}


async def test_a_process_publishes_when_it_begins_and_when_it_ends() -> None:
    store, texts = MemoryKeyValueStore(), iter(["first", "last"])
    published = PublishedMetrics(store, process_id="1")

    async def text() -> str:
        return next(texts)

    async with published.publishing(text):
        while not await store.items():
            await anyio.lowlevel.checkpoint()
        assert (await store.get("1"))[1] == "first"
    assert (await store.get("1"))[1] == "last"


async def test_a_store_out_of_reach_leaves_the_metrics_of_the_process_itself(caplog: pytest.LogCaptureFixture) -> None:
    class OutOfReach(MemoryKeyValueStore):
        async def items(self) -> dict[str, object]:
            raise JobStoreError("the store is gone")

        async def put(self, key: str, value: object, *, skip_if_exists: bool = False) -> bool:
            raise JobStoreError("the store is gone")

    published = PublishedMetrics(OutOfReach(), process_id="1")
    await published.publish("a")
    assert await published.with_own("a") == {"1": "a"}
    assert caplog.text.count("the store is gone") == 2


@pytest.fixture
def many_processes(stand: Stand) -> Callable[[KeyValueStore], CallGateway]:
    def gateway(store: KeyValueStore) -> CallGateway:
        model = stand.model()
        return CallGateway({MODEL: model}, stand.jobs(model), [model], PublishedMetrics(store, process_id="web"))

    return gateway


async def test_the_frontend_shows_the_metrics_of_every_process_with_its_id(
    many_processes: Callable[[KeyValueStore], CallGateway],
) -> None:
    store = MemoryKeyValueStore()
    container = (
        "# HELP modalkit_batch_size Requests in a batch.\n# TYPE modalkit_batch_size histogram\n"
        f'modalkit_batch_size_bucket{{le="+Inf",model="{MODEL}"}} 7.0\n'
        f'modalkit_batch_size_count{{model="{MODEL}"}} 7.0\nmodalkit_batch_size_sum{{model="{MODEL}"}} 20.0\n'
        "# HELP modalkit_batches_total Batches.\n# TYPE modalkit_batches_total counter\n"
        f'modalkit_batches_total{{model="{MODEL}",reason="full"}} 7.0\n'
    )
    await PublishedMetrics(store, process_id="ta-1").publish(container)
    async with serving(create_app(many_processes(store))) as client:
        await client.post("/sync/predict", json={"text": "four"})
        answer: httpx.Response = await client.get("/metrics")
    lines = answer.text.splitlines()
    assert f'modalkit_batch_size_sum{{model="{MODEL}",process="ta-1"}} 20.0' in lines
    assert f'modalkit_batches_total{{model="{MODEL}",process="ta-1",reason="full"}} 7.0' in lines
    assert f'modalkit_model_ready{{model="{MODEL}",process="web"}} 1.0' in lines
    assert len([line for line in lines if line.startswith("# TYPE modalkit_batches_total")]) == 1
    values = [line for line in lines if not line.startswith("#")]
    assert all(re.search('process="(web|ta-1)"', line) for line in values)
