"""``modalkit config``: what is in effect, where it comes from, and nothing secret."""

import json
from pathlib import Path

import pytest

from modalkit.service.settings import Settings
from modalkit.service.settings.yaml_text import parse_yaml
from tests.support.command_line import Modalkit

ROOT = Path(__file__).parents[3]
CONFIGURATION = """\
app_settings:
  batch_config: {max_batch_size: 64, wait_ms: 0}
  queue_config:
    backend: routing
    broker_url: redis://user:s3cret@host
    routes: {"a*": memory}
  auth_config:
    api_key: s3cret
model_settings:
  model_entries:
    lengths:
      pipeline: "tests.support.length_model:LengthPipeline"
      hf_token: s3cret
      tokenizer: words
      note: >-
        a text that is so long that it takes several lines wherever lines have an end
        at a hundred and twenty characters or before
"""


def test_the_defaults_are_the_commented_file(installed_modalkit: Modalkit) -> None:
    assert installed_modalkit("config", "--defaults").stdout == (ROOT / "modalkit.yaml").read_text()


def test_each_value_that_is_no_default_has_its_origin_and_secrets_are_hidden(modalkit: Modalkit, folder: Path) -> None:
    (folder / "modalkit.yaml").write_text(CONFIGURATION)
    done = modalkit("config", MODALKIT_APP_SETTINGS__ASYNC_CONFIG__TIMEOUT="60")
    assert done.returncode == 0, done.stderr
    assert "s3cret" not in done.stdout
    lines = [line.strip() for line in done.stdout.splitlines() if "#" in line]
    assert lines == [
        "api_key: (hidden)  # modalkit.yaml, line 8",
        "max_batch_size: 64  # modalkit.yaml, line 2",
        "backend: routing  # modalkit.yaml, line 4",
        "broker_url: (hidden)  # modalkit.yaml, line 5",
        "a*: memory  # modalkit.yaml, line 6",
        "timeout: 60.0  # MODALKIT_APP_SETTINGS__ASYNC_CONFIG__TIMEOUT",
        "pipeline: tests.support.length_model:LengthPipeline  # modalkit.yaml, line 12",
        "hf_token: (hidden)  # modalkit.yaml, line 13",
        "tokenizer: words  # modalkit.yaml, line 14",
        "# modalkit.yaml, line 15:",
    ]


def test_the_same_can_be_printed_as_json(modalkit: Modalkit, folder: Path) -> None:
    (folder / "modalkit.yaml").write_text(CONFIGURATION)
    done = modalkit("config", "--json")
    assert "s3cret" not in done.stdout
    printed = json.loads(done.stdout)
    assert printed["settings"] == parse_yaml(modalkit("config").stdout)[0]
    assert printed["origins"]["app_settings.batch_config.max_batch_size"] == "modalkit.yaml, line 2"
    assert json.loads(modalkit("config", "--defaults", "--json").stdout)["origins"] == {}


@pytest.mark.parametrize(("url", "shown"), [("redis://host/1", "redis://host/1"), ("redis://h?password=x", "(hidden)")])
def test_an_address_is_hidden_where_it_may_hold_a_password(modalkit: Modalkit, url: str, shown: str) -> None:
    assert f"broker_url: {shown}  #" in modalkit("config", MODALKIT_APP_SETTINGS__QUEUE_CONFIG__BROKER_URL=url).stdout


@pytest.mark.parametrize(
    "line",
    [
        "apiKey: s3cret",
        "db_pwd: s3cret",
        'backends: [{url: "http://a", token: s3cret}]',
        "url: https://s3cret@host/folder",
    ],
)
def test_arguments_of_a_pipeline_that_are_secrets_are_hidden(modalkit: Modalkit, folder: Path, line: str) -> None:
    (folder / "modalkit.yaml").write_text(CONFIGURATION.replace("tokenizer: words", line))
    done = modalkit("config")
    assert done.returncode == 0, done.stderr
    assert "s3cret" not in done.stdout


def test_a_number_of_tokens_is_no_secret(modalkit: Modalkit, folder: Path) -> None:
    line = "max_new_tokens: 4\n      tokens: [s3cret]"
    (folder / "modalkit.yaml").write_text(CONFIGURATION.replace("tokenizer: words", line))
    done = modalkit("config")
    assert "max_new_tokens: 4  #" in done.stdout, done.stderr
    assert "s3cret" not in done.stdout


def test_secrets_of_the_image_are_hidden(modalkit: Modalkit, folder: Path) -> None:
    (folder / "modalkit.yaml").write_text(
        "app_settings: {build_config: {env: {PGPASSWORD: s3cret}, "
        'extra_run_commands: ["pip install git+https://user:s3cret@host/code"]}}'
    )
    done = modalkit("config")
    assert done.returncode == 0, done.stderr
    assert "s3cret" not in done.stdout
    assert "extra_run_commands: (hidden)" in done.stdout


def test_what_it_prints_is_a_configuration_with_the_same_values(modalkit: Modalkit, folder: Path) -> None:
    (folder / "modalkit.yaml").write_text(
        CONFIGURATION.replace("s3cret", "(hidden)").replace("redis://user:(hidden)@host", "(hidden)")
    )
    (folder / "printed.yaml").write_text(modalkit("config").stdout)
    given, printed = (Settings.load([folder / name], {}) for name in ("modalkit.yaml", "printed.yaml"))
    assert printed == given


def test_the_defaults_have_no_comment(modalkit: Modalkit, folder: Path) -> None:
    (folder / "modalkit.yaml").unlink()
    printed = modalkit("config").stdout
    assert "#" not in printed
    assert set(parse_yaml(printed)[0]) == {"app_settings", "model_settings"}
