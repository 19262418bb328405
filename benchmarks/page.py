"""What the page at ``/`` costs a worker that is saturated with jobs, and how soon it is painted beside it.

Run it with ``python -m modalkit.benchmarks.page``, in a clone after ``make test``, on a machine with Chromium. The
browser runs on the same machine, so that its own work counts as well.
"""

import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from playwright.sync_api import Browser, Page, sync_playwright

from modalkit.benchmarks.jobs import serving, told
from modalkit.benchmarks.mixed_load import CONFIGURATION, jobs_alone, submit_backlog

SETTLED_S = 2.0
"""Seconds after the page was opened for which its cost does not count."""
FIRST_PAINT = "performance.getEntriesByName('first-contentful-paint')[0].startTime"


def opened(browser: Browser, url: str) -> tuple[Page, float]:
    """The page in a profile of its own, once it shows batches, and the milliseconds until it was painted first."""
    page = browser.new_page()
    page.goto(url)
    page.get_by_role("option").first.wait_for()
    return page, page.evaluate(FIRST_PAINT)


def main(
    rounds: Annotated[int, typer.Option(help="Rounds, each without the page and with it.")] = 5,
    seconds: Annotated[float, typer.Option(help="Seconds of each measurement.")] = 8.0,
    jobs: Annotated[int, typer.Option(help="Jobs that wait at the start, and last until the end.")] = 300_000,
) -> None:
    """Compare the throughput of a saturated worker with the page open and closed."""
    ratios, paints = list[float](), list[float]()
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(folder), CONFIGURATION) as url,
        sync_playwright() as play,
    ):
        submit_backlog(url, jobs)
        browser = play.chromium.launch(executable_path=shutil.which("chromium") or shutil.which("google-chrome"))
        for number in range(rounds):
            alone = jobs_alone(url, seconds) if number % 2 == 0 else 0.0
            page, paint_ms = opened(browser, url)
            time.sleep(SETTLED_S)
            beside = jobs_alone(url, seconds)
            page.close()
            alone = alone or jobs_alone(url, seconds)
            ratios.append(beside / alone)
            paints.append(paint_ms)
            print(f"{alone:,.0f} jobs /s without the page, {beside:,.0f} with it; first paint {paint_ms:.0f} ms")
        browser.close()
    print(told("throughput with the page, beside without", ratios))
    print(f"first paint: {statistics.median(paints):.0f} ms ({min(paints):.0f} .. {max(paints):.0f})")


if __name__ == "__main__":
    typer.run(main)
