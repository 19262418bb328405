"""A real Chromium, and what every page in it must keep: no errors, and nothing that axe finds."""

import shutil
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, Page, async_playwright, expect

PATIENCE_MS = 60_000
"""How long a page is waited for: as long as the slowest machine may take."""

expect.set_options(timeout=PATIENCE_MS)


@asynccontextmanager
async def chromium() -> AsyncGenerator[Browser]:
    """The Chromium of this machine. Without one, the tests that need it fail."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert path is not None, "these tests need Chromium: install it, as by `apt install chromium`"
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path)
        try:
            yield browser
        finally:
            await browser.close()


@asynccontextmanager
async def page_in(browser: Browser, url: str, **options: Any) -> AsyncGenerator[Page]:
    """A page in a profile of its own; at the end, no error may have been thrown or logged in it.

    A request that was answered with an error is logged by the browser as well, and does not count.
    """
    context = await browser.new_context(base_url=url, **options)
    page = await context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    errors = list[str]()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    yield page
    await context.close()
    assert [error for error in errors if not error.startswith("Failed to load resource")] == []


async def assert_accessible(page: Page) -> None:
    """Check that axe finds nothing wrong with what the page shows."""
    found = await Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
