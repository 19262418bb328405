"""The files to run the service elsewhere: image, compose file, Kubernetes, systemd; and the packages of the image."""

import re
import shutil
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]  # the package has no type information
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ruamel.yaml import YAML

from modalkit.service.settings import Settings
from modalkit.service.version import VERSION
from tests.support.guides import ROOT

DEPLOY = ROOT / "deploy"
BIN = Path(sys.executable).parent
SYSTEMD_ANALYZE = shutil.which("systemd-analyze")
EXTRAS_OF_IMAGE = ("otel", "sqs", "taskiq")


def pins(path: Path) -> dict[str, str]:
    """The version of each package in a file of requirements."""
    found = re.findall(r"^([A-Za-z0-9._-]+)(?:\[.*\])?==([^\s\\;]+)", path.read_text(), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


def needed_by(name: str, extras: tuple[str, ...], found: set[str]) -> set[str]:
    """All packages that one needs on this machine; torch and what only it needs are left out."""
    for requirement in map(Requirement, requires(name) or ()):
        dependency = canonicalize_name(requirement.name)
        wanted = requirement.marker is None or any(
            requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)
        )
        if wanted and dependency != "torch" and dependency not in found:
            found.add(dependency)
            needed_by(dependency, tuple(requirement.extras), found)
    return found


def test_the_image_has_each_package_in_the_version_of_the_constraints_with_hashes() -> None:
    pinned = pins(DEPLOY / "requirements.txt")
    constraints = pins(ROOT / "constraints.txt")
    assert {name: version for name, version in pinned.items() if constraints.get(name, version) != version} == {}
    assert needed_by("modalkit", EXTRAS_OF_IMAGE, set()) - set(pinned) == set()
    assert [name for name in pinned if name.startswith(("cuda-", "nvidia-", "triton"))] == [], "of torch for CUDA alone"
    entries = re.split(r"\n(?=\S)", (DEPLOY / "requirements.txt").read_text().strip())
    assert [entry for entry in entries if "--hash=sha256:" not in entry] == []


def test_hadolint_accepts_the_dockerfiles() -> None:
    files = [ROOT / "Dockerfile", ROOT / "service/cli/templates/Dockerfile"]
    # Versions of the user's own packages are the user's choice.
    run("hadolint", "--ignore", "DL3013", "--failure-threshold", "warning", *map(str, files))


def test_the_compose_file_is_valid_and_names_files_that_exist() -> None:
    run("check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(ROOT / "compose.yaml"))
    (services,) = (one["services"] for one in documents(ROOT / "compose.yaml"))
    mounted = [volume.split(":")[0] for service in services.values() for volume in service.get("volumes", ())]
    assert [path for path in mounted if path.startswith(".") and not (ROOT / path).exists()] == []
    (prometheus,) = documents(DEPLOY / "prometheus.yml")
    assert prometheus["scrape_configs"][0]["static_configs"] == [{"targets": ["modalkit:8000"]}]
    assert services["modalkit"]["ports"] == ["8000:8000"]


def test_the_release_is_a_valid_workflow_that_compares_the_tag_with_the_version() -> None:
    workflow = ROOT / ".github/workflows/release.yml"
    run("check-jsonschema", "--builtin-schema", "vendor.github-workflows", str(workflow))
    (steps,) = (job["steps"] for name, job in documents(workflow)[0]["jobs"].items() if name == "packages")
    compare = next(step["run"] for step in steps if step.get("name", "").startswith("The tag is"))
    for tag, exit_code in ((f"v{VERSION}", 0), ("v0.0.0", 1)):
        done = subprocess.run(["/bin/sh", "-c", compare], check=False, cwd=ROOT, env={"GITHUB_REF_NAME": tag})
        assert done.returncode == exit_code


def test_kubernetes_accepts_the_manifests() -> None:
    for manifest in documents(DEPLOY / "kubernetes.yaml"):
        kubernetes_validate.validate(manifest, "1.33", strict=True)


@pytest.mark.skipif(SYSTEMD_ANALYZE is None, reason="systemd is not installed")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "modalkit.service"
    unit.write_text((DEPLOY / "modalkit.service").read_text().replace("/opt/modalkit/bin/modalkit", sys.executable))
    done = subprocess.run([str(SYSTEMD_ANALYZE), "verify", str(unit)], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_each_setting_that_these_files_give_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    files = [ROOT / "Dockerfile", ROOT / "compose.yaml", *DEPLOY.glob("*.yaml"), DEPLOY / "modalkit.service"]
    names = {name for file in files for name in re.findall(r"MODALKIT_APP_SETTINGS__\w+", file.read_text())}
    assert len(names) == 2
    for name in names:
        monkeypatch.setenv(name, f"{tmp_path}/a-value")
    settings = Settings.load().app_settings
    assert settings.async_config.store_path == Path(f"{tmp_path}/a-value")
    assert settings.auth_config.asks_for_key


def run(program: str, *arguments: str) -> None:
    done = subprocess.run([BIN / program, *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def documents(path: Path) -> list[Any]:
    return list(YAML(typ="safe").load_all(path.read_text()))
