"""The dashboard, the alert rules and the guide about metrics, checked against a service."""

import json
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from ruamel.yaml import YAML

from modalkit.pipelines import EngineChoice
from modalkit.service.local_gateway import LocalGateway
from modalkit.service.queue_backends import InMemoryBackend
from modalkit.service.settings import Settings
from modalkit.service.web import create_app
from tests.support.guides import ROOT, guide, section
from tests.support.http_client import ended, job
from tests.support.http_server import serving
from tests.support.length_model import LengthPipeline

pytestmark = pytest.mark.anyio

MONITORING = ROOT / "docs" / "monitoring"
FUNCTIONS = {"and", "by", "histogram_quantile", "label_values", "max", "on", "rate", "sum"}
LABELS_OF_PROMETHEUS = {"instance", "process"}
"""Labels that Prometheus adds, and that processes on Modal have."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def exposed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, set[str]]:
    """The labels of each metric of a service that has run a request and delivered a job."""
    monkeypatch.setattr(LengthPipeline, "engine_choice", EngineChoice(engine="torch", dtype="float32", reason="only"))
    settings = Settings(
        _config_files=[],
        app_settings={"async_config": {"store_path": tmp_path / "jobs.db"}},
        model_settings={"model_entries": {"lengths": {"pipeline": "tests.support.length_model:LengthPipeline"}}},
    )
    gateway, queue = LocalGateway(settings, queue_backend=InMemoryBackend()), "results"
    async with serving(create_app(gateway)) as client:
        await gateway.wait_until_ready()
        await client.post("/sync/predict", json={"text": "four"})
        job_id = (await client.post("/async/predict", json=job("four", success_queue=queue))).json()["job_id"]
        await ended(client, job_id)
        while (await client.get(f"/jobs/{job_id}")).json()["delivery"] != "delivered":
            pass
        text = (await client.get("/metrics")).text
    labels = defaultdict[str, set[str]](set)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels[sample.name] |= set(sample.labels)
    labels["modalkit_oldest_queued_job_seconds"] = {"model"}  # only while a job is queued: see test_metrics.py
    return labels


def dashboard() -> dict[str, Any]:
    read: dict[str, Any] = json.loads((MONITORING / "grafana.json").read_text())
    return read


def dashboard_expressions() -> list[str]:
    panels = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", [])]
    variables = [variable["query"] for variable in dashboard()["templating"]["list"] if variable["type"] == "query"]
    return panels + [variable["query"] for variable in variables]


def alert_rules() -> list[dict[str, Any]]:
    groups = YAML(typ="safe").load(MONITORING / "alerts.yaml")["groups"]
    return [rule for group in groups for rule in group["rules"]]


def used_labels(expression: str) -> Iterator[tuple[str, str]]:
    """Each label that an expression uses, with the metric that it uses it of."""
    bare = re.sub(r'"[^"]*"', '""', expression)
    assert all(bare.count(opening) == bare.count(closing) for opening, closing in ("()", "{}", "[]")), expression
    no_names = r"\{[^}]*\}|\[[^\]]*\]|\b(?:by|on) \([^)]*\)|[\d.]+\w*"
    metrics = set(re.findall(r"[a-zA-Z_]\w*", re.sub(no_names, "", bare)))
    for name in metrics - FUNCTIONS - {"route", "model"}:
        yield name, ""
        for matchers in re.findall(rf"\b{name}\{{([^}}]*)\}}", bare):
            yield from ((name, label) for label in re.findall(r"(\w+)\s*[=!]", matchers))
        for grouped in re.findall(r"\bby \(([^)]*)\)", bare):
            yield from ((name, label.strip()) for label in grouped.split(","))


async def test_the_dashboard_and_the_alerts_use_metrics_and_labels_that_there_are(
    exposed: Mapping[str, set[str]],
) -> None:
    expressions = [*dashboard_expressions(), *(rule["expr"] for rule in alert_rules())]
    assert len(expressions) > 30
    for expression in expressions:
        used = list(used_labels(expression))
        assert used, expression
        for metric, label in used:
            assert metric in exposed, f"there is no metric {metric}: {expression}"
            assert label in exposed[metric] | LABELS_OF_PROMETHEUS | {""}, f"{metric} has no {label}: {expression}"


async def test_the_guide_has_every_metric_with_its_labels_and_no_other(exposed: Mapping[str, set[str]]) -> None:
    rows = re.findall(
        r"^\| `(modalkit_\w+)` \| (\w+) \|([^|]*)\|", section(guide("monitoring.md"), "Metrics"), re.MULTILINE
    )
    documented = {name: set(re.findall(r"`(\w+)`", labels)) for name, _, labels in rows}
    assert len(documented) == len(rows)
    of_histograms = re.compile("_(bucket|sum|count)$")
    found = defaultdict[str, set[str]](set)
    for name, labels in exposed.items():
        if name.startswith("modalkit_"):
            found[of_histograms.sub("", name)] |= labels - {"le"}
    assert documented == found


async def test_the_guide_tells_what_to_do_for_every_alert() -> None:
    told = re.findall(r"`(Modalkit\w+)`", guide("monitoring.md"))
    assert sorted(told) == sorted(rule["alert"] for rule in alert_rules())


def test_every_alert_says_what_is_wrong_and_how_bad_that_is() -> None:
    for rule in alert_rules():
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["annotations"].keys() == {"summary", "description"}


def test_the_panels_of_the_dashboard_do_not_overlap_and_have_ids_of_their_own() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool, a part of Prometheus, is not installed")
def test_prometheus_takes_the_alert_rules() -> None:
    subprocess.run(["promtool", "check", "rules", MONITORING / "alerts.yaml"], check=True)  # noqa: S607  # found above
