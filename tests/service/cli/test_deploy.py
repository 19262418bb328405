"""``modalkit deploy``: what a dry run shows, and that Modal's own command is run."""

import json
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.support.command_line import Modalkit

CONFIGURATION = """
app_settings:
  app_prefix: reviews
  build_config: {env: {A: b}, extra_run_commands: "apt-get update"}
  deployment_config:
    gpu: [L4, T4]
    region: [us-east, eu-west]
    secrets: [hub-token]
    volumes: {/models: weights}
    cloud_bucket_mounts: [{mount_point: /data, bucket_name: mine, secret: aws}]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "modalkit.yaml").write_text(CONFIGURATION)
    return tmp_path


@pytest.fixture
def environment(environment: dict[str, str]) -> dict[str, str]:
    """Without a token, and without any network to look for one."""
    unreachable = {"MODAL_SERVER_URL": "http://127.0.0.1:9", "MODAL_CONFIG_PATH": "no-such-file"}
    return {name: value for name, value in environment.items() if name != "PYTHONWARNINGS"} | unreachable


def described(modalkit: Modalkit, *arguments: str, **variables: str) -> dict[str, Any]:
    done = modalkit("deploy", "--dry-run", *arguments, **variables)
    assert done.returncode == 0, done.stderr
    content: dict[str, Any] = YAML(typ="safe").load(done.stdout)
    return content


def test_a_dry_run_shows_every_setting_without_network_or_token(installed_modalkit: Modalkit, folder: Path) -> None:
    shown = described(installed_modalkit)
    assert shown["app"] == "reviews-dev"
    settings = shown["class"]["settings"]
    assert settings["gpu"] == ["L4", "T4"]
    assert settings["secrets"] == ["hub-token"]
    assert settings["volumes"] == {"/models": {"volume": "weights"}, "/data": {"bucket_name": "mine", "secret": "aws"}}
    assert settings["env"]["MODALKIT_CONFIG"] == "/root/modalkit_config/0-modalkit.yaml"
    assert shown["class"]["concurrency"] == {"max_inputs": 64, "target_inputs": 8}
    assert shown["class"]["parameters"] == {"model_name": ["sentiment"]}
    web = shown["web_function"]
    assert web["settings"]["region"] == settings["region"] == ["us-east", "eu-west"]
    assert "gpu" not in web["settings"]
    assert web["concurrency"] == {"max_inputs": 256}
    assert web["asgi_app"] == {"requires_proxy_auth": True}
    methods = [next(iter(step)) for step in shown["image"]]
    assert methods[:5] == ["from_registry", "workdir", "env", "uv_pip_install", "run_commands"]
    assert {
        "add_local_file": str(folder / "modalkit.yaml"),
        "remote_path": "/root/modalkit_config/0-modalkit.yaml",
    } in (shown["image"])
    assert json.loads(installed_modalkit("deploy", "--dry-run", "--json").stdout) == shown


def test_a_dry_run_says_what_old_names_are_called_now(modalkit: Modalkit, folder: Path) -> None:
    (folder / "modalkit.yaml").write_text(
        "app_settings: {deployment_config: {concurrency_limit: 3, container_idle_timeout: 60, "
        "allow_concurrent_inputs: 9, allow_concurrent_inputs_handler: 90}}"
    )
    done = modalkit("deploy", "--dry-run")
    shown = YAML(typ="safe").load(done.stdout)
    assert shown["class"]["settings"]["max_containers"] == 3
    assert shown["class"]["settings"]["scaledown_window"] == 60
    assert shown["class"]["concurrency"] == {"max_inputs": 9, "target_inputs": 8}
    assert shown["web_function"]["concurrency"] == {"max_inputs": 90}
    for new in ("max_containers", "scaledown_window", "max_concurrent_inputs", "max_concurrent_requests"):
        assert f"is now called {new}: rename it" in done.stderr
    assert done.stderr.count("modalkit: warning: ") == 4


def test_a_dry_run_hides_secrets(modalkit: Modalkit) -> None:
    done = modalkit(
        "deploy",
        "--dry-run",
        MODALKIT_APP_SETTINGS__AUTH_CONFIG__API_KEY="opensesame-1",
        MODALKIT_APP_SETTINGS__QUEUE_CONFIG__BROKER_URL="redis://:opensesame-2@host",
        MODALKIT_APP_SETTINGS__QUEUE_CONFIG__WEBHOOK="{secret: opensesame-3}",
        MODALKIT_API_KEY="opensesame-4",
        MODALKIT_APP_SETTINGS__BATCH_CONFIG__WAIT_MS="7",
    )
    assert done.returncode == 0, done.stderr
    assert "opensesame" not in done.stdout + done.stderr
    env = YAML(typ="safe").load(done.stdout)["class"]["settings"]["env"]
    assert env["MODALKIT_APP_SETTINGS__AUTH_CONFIG__API_KEY"] == "(hidden)"
    assert env["MODALKIT_APP_SETTINGS__BATCH_CONFIG__WAIT_MS"] == "7"


@pytest.mark.parametrize("app", ["reviews_app", "reviews_app.py", "reviews_app.py::app"])
def test_a_dry_run_of_an_app_shows_the_local_modules_that_it_imports(
    modalkit: Modalkit, folder: Path, app: str
) -> None:
    (folder / "reviews_app.py").write_text("import reviews_helpers\n")
    (folder / "reviews_helpers.py").touch()
    steps = described(modalkit, app)["image"]
    for name in ("reviews_app.py", "reviews_helpers.py"):
        assert {"add_local_file": str(folder / name), "remote_path": f"/root/{name}"} in steps


def test_a_dry_run_of_an_app_shows_its_own_configuration_and_says_what_it_does_not_show(
    modalkit: Modalkit, folder: Path
) -> None:
    (folder / "own.yaml").write_text("app_settings: {app_prefix: own, deployment_config: {gpu: H100}}")
    (folder / "own_app.py").write_text(
        "from pathlib import Path\n"
        "from modalkit.modal_config import ModalConfig\n"
        "from modalkit.settings import Settings\n"
        "mine = ModalConfig(Settings.load([Path('own.yaml')]))\n"
    )
    done = modalkit("deploy", "--dry-run", "own_app.py")
    shown = YAML(typ="safe").load(done.stdout)
    assert (shown["app"], shown["class"]["settings"]["gpu"]) == ("own-dev", "H100")
    assert "note: this is the image of own_app.py and what its ModalConfig has for each decorator" in done.stderr


def test_files_of_the_configuration_may_be_given(modalkit: Modalkit, folder: Path) -> None:
    (folder / "more.yaml").write_text("app_settings: {deployment_config: {gpu: H100}}")
    shown = described(modalkit, "--config", "modalkit.yaml", "--config", "more.yaml")
    assert shown["app"] == "reviews-dev"
    assert shown["class"]["settings"]["gpu"] == "H100"
    assert shown["class"]["settings"]["env"]["MODALKIT_CONFIG"].endswith("1-more.yaml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--config", "gone.yaml"), "gone.yaml: no such file"),
        (("--dry-run", "--config", "gone.yaml"), "gone.yaml: no such file"),
        (("--dry-run", "no_such_app"), "the app 'no_such_app' cannot be imported: "),
        (("--dry-run", "no_such_app.py"), "there is no file no_such_app.py; check its name"),
        (("no_such_app.py::app",), "there is no file no_such_app.py; check its name"),
        (("--config", "a,b.yaml"), "comma"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(modalkit: Modalkit, arguments: tuple[str, ...], message: str) -> None:
    done = modalkit("deploy", *arguments)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not done.stdout


SEES = """
import os, sys
print("modal got", sys.argv[1:], os.environ.get("MODALKIT_CONFIG"))
sys.exit(7)
"""


def test_modals_own_command_is_run_and_its_exit_code_passed_on(modalkit: Modalkit, folder: Path) -> None:
    (folder / "modal").mkdir()
    (folder / "modal" / "__init__.py").touch()
    (folder / "modal" / "__main__.py").write_text(SEES)
    (folder / "more.yaml").touch()
    default = modalkit("deploy", "--config", "more.yaml")
    assert (default.returncode, default.stderr) == (7, "")
    assert default.stdout == "modal got ['deploy', '-m', '--', 'modalkit.service.modal_app'] more.yaml\n"
    (folder / "own.py").touch()
    file = modalkit("deploy", "own.py", "--name", "mine", "--env", "staging", "--tag", "v1")
    assert file.stdout == "modal got ['deploy', '--name=mine', '--env=staging', '--tag=v1', '--', 'own.py'] None\n"


def test_modal_itself_takes_these_arguments(modalkit: Modalkit, folder: Path) -> None:
    (folder / "own.py").write_text("raise SystemExit('the app was imported')\n")
    assert "the app was imported" in modalkit("deploy", "own.py", "--name", "mine", "--env", "staging").stderr
    assert "the app was imported" in modalkit("deploy", "own").stderr


def test_help_has_examples(modalkit: Modalkit) -> None:
    done = modalkit("deploy", "--help")
    assert done.returncode == 0
    assert "modalkit deploy --dry-run" in done.stdout


def test_a_dry_run_says_what_the_image_lacks_for_the_users_modules(modalkit: Modalkit, folder: Path) -> None:
    """A package, a module and files that a pipeline needs, with the key that adds each; not what may be missing."""
    (folder / "mine.py").write_text(
        "import numpy, yaml, werkzeug\n"
        "import helper\n"
        "from pathlib import Path\n"
        "from modalkit.inference_pipeline import InferencePipeline\n"
        "try:\n    import pytest\nexcept ImportError:\n    pytest = None\n"
        "LABELS = Path(__file__).parent / 'data' / 'labels.txt'\n"
        "class Mine(InferencePipeline):\n"
        "    def load(self): return open('vocab.json'), 'no file', Path('data', 'known.txt')\n"
    )
    (folder / "data").mkdir()
    for name in ("helper.py", "data/labels.txt", "data/known.txt", "vocab.json", "weights.bin", "other.txt"):
        (folder / name).touch()
    (folder / "modalkit.yaml").write_text(
        "app_settings: {deployment_config: {mounts: [{local_path: data/known.txt, remote_path: data/known.txt}]}}\n"
        "model_settings: {model_entries: {mine: {pipeline: 'mine:Mine', weights: weights.bin}}}\n"
    )
    done = modalkit("deploy", "--dry-run")
    assert done.returncode == 0, done.stderr
    gaps = [line.removeprefix("modalkit: warning: ") for line in done.stderr.splitlines()]
    files = ("mine.py names the file data/labels.txt", "mine.py names the file vocab.json")
    assert [gap.partition(",")[0] for gap in gaps] == [
        *("mine.py imports werkzeug", "mine.py imports helper", *files),
        "model_settings.model_entries.mine names the file weights.bin",
    ]
    assert "app_settings.build_config.extra_run_commands: pip install Werkzeug==" in gaps[0]
    assert "app_settings.build_config.python_modules: [helper]" in gaps[1]
    assert "mounts: {local_path: data/labels.txt, remote_path: /root/data/labels.txt}" in gaps[2]


@pytest.mark.parametrize("text", ["'" + "я" * 200 + "'", " + ".join(["'a'"] * 2000)])
def test_long_texts_of_the_users_modules_stop_no_deployment(modalkit: Modalkit, folder: Path, text: str) -> None:
    (folder / "mine.py").write_text(
        "from modalkit.inference_pipeline import InferencePipeline\n"
        f"TEXT = {text}\n"
        "class Mine(InferencePipeline):\n"
        "    def run_inference(self, input_list): return []\n"
    )
    (folder / "modalkit.yaml").write_text("model_settings: {model_entries: {mine: {pipeline: 'mine:Mine'}}}\n")
    done = modalkit("deploy", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_dry_run_is_silent_about_what_was_added(modalkit: Modalkit, folder: Path) -> None:
    (folder / "mine.py").write_text("import werkzeug, helper\n")
    (folder / "helper.py").touch()
    (folder / "modalkit.yaml").write_text(
        "app_settings: {build_config: {extra_run_commands: pip install werkzeug>=3, python_modules: [helper]}}\n"
        "model_settings: {model_entries: {mine: {pipeline: 'mine:Mine'}}}\n"
    )
    assert modalkit("deploy", "--dry-run").stderr == ""
