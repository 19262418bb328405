"""The page in a real Chromium: what it shows, what can be done with it, and for whom it works."""

import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
import pytest
from playwright.async_api import Browser, Page, expect
from pydantic import BaseModel, Field

from modalkit.service.local_gateway import LocalGateway
from modalkit.service.queue_backends import InMemoryBackend
from modalkit.service.settings import AuthConfig, Settings
from modalkit.service.web import create_app
from modalkit.service.web.ui import samples
from tests.support.browser import assert_accessible, chromium, page_in
from tests.support.http_client import job
from tests.support.http_server import serving
from tests.support.length_model import POISON, LengthPipeline

pytestmark = pytest.mark.anyio

HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
PHONE: dict[str, Any] = {"viewport": {"width": 360, "height": 740}, "has_touch": True}


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with chromium() as opened:
        yield opened


@pytest.fixture(autouse=True)
def _short_period(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "PERIOD_S", 0.2)


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[LocalGateway]:
    settings = Settings(
        app_settings={
            "async_config": {"store_path": tmp_path / "jobs.db"},
            "batch_config": {"calibration": {"enabled": False}},
        },
        model_settings={"model_entries": {"lengths": {"pipeline": "tests.support.length_model:LengthPipeline"}}},
    )
    async with LocalGateway(settings, queue_backend=InMemoryBackend()) as opened:
        await opened.wait_until_ready()
        yield opened


@pytest.fixture
def pipeline(gateway: LocalGateway) -> Iterator[LengthPipeline]:
    worker = gateway.models["lengths"].worker
    assert worker is not None
    assert isinstance(worker.pipeline, LengthPipeline)
    yield worker.pipeline
    worker.pipeline.gate.set()


@asynccontextmanager
async def opened(
    browser: Browser, gateway: LocalGateway, auth: AuthConfig | None = None, **options: Any
) -> AsyncIterator[tuple[Page, httpx.AsyncClient]]:
    app = create_app(gateway, auth=auth, owns_gateway=False)
    async with serving(app) as client, page_in(browser, str(client.base_url), **options) as page:
        yield page, client


async def test_a_request_of_the_playground_is_answered_and_its_batch_is_shown_live(
    browser: Browser, gateway: LocalGateway
) -> None:
    async with opened(browser, gateway) as (page, _):
        await page.goto("/#try")
        await page.get_by_label("text", exact=True).fill("it's four")
        await expect(page.locator("#code")).to_contain_text("""-d '{"text":"it'\\''s four"}'""")
        await page.get_by_role("button", name="Python").click()
        await expect(page.locator("#code")).to_contain_text('json={"text": "it\'s four"}')
        await page.get_by_label("Copies").fill("3")
        await page.get_by_role("button", name="Send").click()
        await expect(page.locator("#answer")).to_contain_text('"length": 9')
        await expect(page.locator("#rode")).to_contain_text("It ran in one batch.")
        await expect(page.locator("#rode .riders tbody tr")).to_have_count(3)
        await page.get_by_role("link", name="Live").click()
        batch = page.get_by_role("option", name="Batch 1: 3 requests")
        await expect(batch).to_have_accessible_name(re.compile("with your request$"))
        await batch.focus()
        await page.keyboard.press("Enter")
        await expect(page.locator("#batch")).to_contain_text("3 (interactive)")
        await expect(page.locator("#figures")).to_contain_text("Items in a batch3")
        await expect(page.locator("#connection")).to_have_text("Live")


async def test_a_model_that_is_not_ready_is_named_beside_others_that_are(browser: Browser) -> None:
    """However long its name is, also on a phone."""
    name = "a-model-with-a-name-that-is-wider-than-the-screen-of-a-phone"
    entries = {
        "good": {"pipeline": "tests.support.length_model:LengthPipeline"},
        name: {"pipeline": f"{__name__}:Unloadable"},
    }
    settings = Settings(
        app_settings={"async_config": {"store": "memory"}, "batch_config": {"calibration": {"enabled": False}}},
        model_settings={"model_entries": entries},
    )
    async with LocalGateway(settings) as gateway, opened(browser, gateway, **PHONE) as (page, _):
        await gateway.wait_until_settled()
        await page.goto("/#live")
        await expect(page.locator("#connection")).to_have_text(f"Live · {name} failed")
        assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")


class Unloadable(LengthPipeline):
    def __init__(self) -> None:
        raise FileNotFoundError("weights.bin")


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = Field(ge=1)


class Dog(BaseModel):
    kind: Literal["dog"]


class Priced(BaseModel):
    animal: Annotated[Cat | Dog, Field(discriminator="kind")]
    price: Decimal


async def test_the_playground_begins_with_the_first_of_several_types(browser: Browser) -> None:
    entry = {"pipeline": "tests.support.length_model:LengthPipeline", "input_model": f"{__name__}:Priced"}
    memory = {"async_config": {"store": "memory"}}
    settings = Settings(app_settings=memory, model_settings={"model_entries": {"animals": entry}})
    async with opened(browser, LocalGateway(settings)) as (page, _):
        await page.goto("/#try")
        await expect(page.locator("#code")).to_contain_text('{"animal":{"kind":"cat","lives":1},"price":0}')


async def test_a_job_is_submitted_seen_waiting_and_cancelled(
    browser: Browser, gateway: LocalGateway, pipeline: LengthPipeline
) -> None:
    pipeline.gate.clear()
    async with opened(browser, gateway) as (page, client):
        await page.goto("/ui#try")
        await page.get_by_label("text", exact=True).fill("four")
        await page.get_by_label("How").select_option("As a job")
        await page.get_by_role("button", name="Send").click()
        await page.get_by_role("list", name="Jobs").get_by_role("link").click()
        dialog = page.get_by_role("dialog")
        await expect(dialog).to_contain_text("running")
        await dialog.get_by_role("button", name="Cancel the job").click()
        await expect(dialog).to_contain_text("cancelled")
        await page.keyboard.press("Escape")
        await expect(page.get_by_role("button", name="Cancelled 1")).to_be_visible()
        (stored,) = (await client.get("/jobs")).json()["jobs"]
        assert stored["status"] == "cancelled"
        pipeline.gate.set()


async def test_texts_of_callers_are_shown_as_texts(browser: Browser, gateway: LocalGateway) -> None:
    async with opened(browser, gateway) as (page, client):
        hostile = job("four", meta={HOSTILE: HOSTILE}, success_queue="ok", idempotency_key=HOSTILE)
        job_id = (await client.post("/async/predict", json=hostile)).json()["job_id"]
        failing = (await client.post("/async/predict", json=job(POISON, meta={"why": HOSTILE}))).json()["job_id"]
        for each in (job_id, failing):
            await client.get(f"/jobs/{each}?wait=30")
        await page.goto("/#jobs")
        await expect(page.get_by_role("row")).to_have_count(3)
        await expect(page.get_by_role("row", name=failing)).to_contain_text("this batch is poisoned")
        await page.get_by_role("link", name=job_id).click()
        await expect(page.get_by_role("dialog")).to_contain_text(HOSTILE)
        await page.get_by_role("button", name="Close").click()
        await page.get_by_label("Search jobs").fill("onerror")
        await page.keyboard.press("Enter")
        await expect(page.locator("#jobs-note")).to_contain_text("Searched the newest 2 jobs.")
        await expect(page.get_by_role("row")).to_have_count(3)
        await page.get_by_label("Search jobs").fill(failing)
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("row")).to_have_count(2)
        await page.goto(f"/#jobs/{HOSTILE}")
        await expect(page.get_by_role("dialog")).to_contain_text(HOSTILE)
        assert await page.evaluate("window.hacked") is None


async def test_a_key_is_asked_for_and_kept_out_of_addresses(browser: Browser, gateway: LocalGateway) -> None:
    async with opened(browser, gateway, AuthConfig(api_key="s3cret-key")) as (page, _):
        addresses = list[str]()
        page.on("request", lambda request: addresses.append(request.url))
        await page.goto("/")
        for key, reason in (("wrong", "This service asks for a key."), ("s3cret-key", "the API key is wrong")):
            await expect(page.get_by_role("dialog")).to_contain_text(reason)
            await page.get_by_label("Key", exact=True).fill(key)
            await page.keyboard.press("Enter")
        await expect(page.locator("#connection")).to_have_text("Live")
        await page.get_by_role("link", name="Playground").click()
        await expect(page.locator("#code")).to_contain_text("Authorization: Bearer <your key>")
        await page.get_by_label("text", exact=True).fill("four")
        await page.get_by_role("button", name="Send").click()
        await expect(page.locator("#answer")).to_contain_text('"length": 4')
        assert await page.evaluate("Object.keys(localStorage)") == []
        assert not [address for address in addresses if "key" in address]


@pytest.mark.parametrize("options", [{"color_scheme": "light"}, {"color_scheme": "dark", **PHONE}])
async def test_axe_finds_nothing_and_nothing_is_wider_than_the_screen(
    browser: Browser, gateway: LocalGateway, options: dict[str, Any]
) -> None:
    async with opened(browser, gateway, **options) as (page, client):
        await client.post("/batch/predict", json=[{"text": "x" * size} for size in range(1, 40)])
        failing = (await client.post("/async/predict", json=job(POISON, meta={"name": "x" * 200}))).json()["job_id"]
        await client.get(f"/jobs/{failing}?wait=30")
        await page.goto("/")
        await page.get_by_role("option").first.click()
        for view, shown in {
            "#live": page.locator("#batch"),
            "#jobs": page.get_by_role("link", name=failing),
            f"#jobs/{failing}": page.get_by_role("dialog"),
            "#try": page.get_by_role("button", name="Send"),
            "#models": page.get_by_role("heading", name="lengths"),
        }.items():
            await page.goto(f"/{view}")
            await expect(shown).to_be_visible()
            await assert_accessible(page)
            widths = await page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
            assert widths[0] <= widths[1], view
