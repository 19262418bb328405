"""What the command line says about itself, the configuration, and the models."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.support.command_line import CONFIGURATION, MODALKIT, Modalkit
from tests.support.sqs_server import REGION, SqsServer


def test_the_version_is_that_of_the_installed_package(installed_modalkit: Modalkit) -> None:
    assert installed_modalkit("--version").stdout == f"modalkit {version('modalkit')}\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("serve", "--port", "99999"), 2, "'--port': must be a whole number from 0 to 65535, not 99999"),
        (("serve", "--grace", "x"), 2, "'--grace': must be a number above 0, not x"),
        (("serve", "--log-level", "loud"), 2, "'--log-level': must be one of debug, info, warning, error, not 'loud'"),
        (("jobs", "list", "--limit", "0"), 2, "'--limit': must be a whole number from 1, not 0"),
        (("submit", "x", "--patience", "-1"), 2, "'--patience': must be a number from 0, not -1"),
        (("predict", "-i", "."), 2, "--input: . is no file; give the name of one, or - for standard input"),
        (("jobs", "backup", "no/copy.db"), 2, "FILE: there is no folder no: make it, or name another file"),
        (("init", "modalkit.yaml/new"), 1, "error: cannot use modalkit.yaml/new: Not a directory; correct the path"),
    ],
)
def test_a_refusal_names_the_option_the_value_and_the_remedy(
    modalkit: Modalkit, folder: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    (folder / "jobs.db").touch()
    done = modalkit(*arguments)
    assert done.returncode == code
    assert message in " ".join(done.stderr.replace("│", " ").split())


def test_closed_standard_streams_are_no_error(environment: dict[str, str], folder: Path) -> None:
    command = [sys.executable, *MODALKIT, "predict", "a text", "-o", "out.jsonl"]
    subprocess.run(
        ["/bin/sh", "-c", '"$@" <&- >&- 2>&-', "sh", *command], cwd=folder, env=environment, check=True, timeout=100
    )
    assert (folder / "out.jsonl").read_text().count("\n") == 1


def test_a_folder_that_was_removed_is_no_folder_with_a_configuration(
    environment: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, *MODALKIT, "config"]
    done = subprocess.run(
        ["/bin/sh", "-c", 'mkdir gone && cd gone && rmdir ../gone && exec "$@"', "sh", *command],
        cwd=tmp_path,
        env=environment | {"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    assert "app_prefix: sentiment" in done.stdout


def test_an_interrupt_while_modules_are_imported_shows_no_traceback(environment: dict[str, str]) -> None:
    program = (
        "import sys, modalkit.__main__ as command\n"
        "class Interrupt:\n"
        "    def find_spec(name, *_):\n"
        "        if name == 'modalkit.service.cli': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt)\n"
        "command.main()"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (130, b"")


@pytest.mark.parametrize("command", ["serve", "predict", "check"])
def test_help_has_examples(modalkit: Modalkit, command: str) -> None:
    done = modalkit(command, "--help")
    assert done.returncode == 0
    assert "Examples" in done.stdout
    assert f"modalkit {command}" in done.stdout


def test_check_says_what_would_be_served(installed_modalkit: Modalkit) -> None:
    done = installed_modalkit("check")
    assert done.returncode == 0, done.stderr
    for expected in ("lengths", "LengthPipeline", "4 items in", "jobs.db", "InMemoryBackend"):
        assert expected in done.stdout


@pytest.mark.parametrize(
    ("configuration", "message"),
    [
        ("app_settings: {batch_config: {max_batch_sise: 8}}", "did you mean max_batch_size?"),
        ("app_settings: {batch_config: {max_batch_size: many}}", "app_settings.batch_config.max_batch_size"),
        ("app_settings: [", "modalkit.yaml"),
        ("model_settings: {model_entries: {a: {pipeline: 'nowhere:Model'}}}", "there is no module 'nowhere'"),
        (
            "model_settings: {model_entries: {a: {pipeline: 'json:Model'}}}",
            "json/__init__.py) has no 'Model'",
        ),
        ("model_settings: {model_entries: {a: {pipeline: 'json:JSONDecoder'}}}", "subclass of InferencePipeline"),
        (
            "app_settings: {queue_config: {backend: webhook, webhook: {allowed_hosts: [a.example], secret: short}}}",
            "the secret for webhooks",
        ),
        ("app_settings: {queue_config: {backend: 'json:JSONDecoder'}}", "send_message"),
        ("app_settings: {auth_config: {ssm_key: /key}}", "ssm_key"),
        (
            "model_settings: {model_entries: {a: {pipeline: 'tests.support.length_model:UnloadablePipeline'}}}",
            "the weights are not there",
        ),
    ],
)
@pytest.mark.parametrize("command", ["check", "serve"])
def test_a_wrong_configuration_is_one_message_and_exit_code_2(
    modalkit: Modalkit, folder: Path, command: str, configuration: str, message: str
) -> None:
    (folder / "modalkit.yaml").write_text(configuration)
    (folder / "quick.yaml").write_text(CONFIGURATION)
    files = "modalkit.yaml" if "model_settings" in configuration else "quick.yaml,modalkit.yaml"
    done = modalkit(command, *(("--port", "0") if command == "serve" else ()), MODALKIT_CONFIG=files)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    if "the weights" not in message or command == "check":  # a server logs why a model cannot be loaded
        assert done.stderr.startswith("modalkit: error: ")


@pytest.mark.parametrize("command", ["check", "serve"])
def test_a_key_that_is_not_in_ssm_is_one_message_and_exit_code_2(modalkit: Modalkit, command: str) -> None:
    aws = SqsServer()
    aws.start()
    try:
        done = modalkit(
            command,
            *(("--port", "0") if command == "serve" else ()),
            MODALKIT_APP_SETTINGS__AUTH_CONFIG__SSM_KEY="/keys/nowhere",
            AWS_ENDPOINT_URL_SSM=aws.url,
            AWS_REGION=REGION,
            AWS_ACCESS_KEY_ID="made-up",
            AWS_SECRET_ACCESS_KEY="made-up",
        )
    finally:
        aws.stop()
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("modalkit: error: app_settings.auth_config.ssm_key: parameter '/keys/nowhere'")
    assert done.stderr.count("\n") == 1


def test_without_a_key_it_serves_no_other_machines(modalkit: Modalkit) -> None:
    done = modalkit("serve", "--host", "0.0.0.0", "--port", "0")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("modalkit: error: without an API key nothing is served on 0.0.0.0")
    assert done.stderr.count("\n") == 1


def test_a_misspelt_variable_is_refused(modalkit: Modalkit) -> None:
    done = modalkit("check", MODALKIT_APP_SETTINGS__BATCH_CONFIG__WAIT_MSS="5")
    assert done.returncode == 2
    assert "MODALKIT_APP_SETTINGS__BATCH_CONFIG__WAIT_MS" in done.stderr


def test_a_folder_in_the_way_does_not_hide_our_packages(installed_modalkit: Modalkit, folder: Path) -> None:
    for name in ("service", "batching", "pipelines"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise ImportError('the wrong package')")
    assert installed_modalkit("predict", "four").returncode == 0
