"""The configuration: where it comes from, what wins, and how what is wrong is refused."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML

from modalkit.batching import BatchPolicy
from modalkit.service.pipeline_batches import batch_policy
from modalkit.service.settings import BatchConfig, ModelEntry, Settings, SettingsError, deep_merge
from modalkit.service.settings.schema import section_in

ROOT = Path(__file__).parents[2]


def load(text: str, *more: str, **variables: str) -> Settings:
    """The settings from files with these contents, in the working directory of the test."""
    files = []
    for n, content in enumerate((text, *more)):
        files.append(Path(f"config{n}.yaml"))
        files[-1].write_text(content)
    return Settings.load(files, {f"MODALKIT_{name}": value for name, value in variables.items()})


def refused(text: str, **variables: str) -> str:
    with pytest.raises(SettingsError) as caught:
        load(text, **variables)
    return str(caught.value)


def keys(values: Any, at: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield f"{at}{key}"
        if isinstance(value, dict):
            yield from keys(value, f"{at}{key}.")


def test_defaults_are_those_of_the_file_that_ships_and_it_shows_every_key() -> None:
    assert Settings.load([ROOT / "modalkit.yaml"], {}) == Settings.load([], {})
    shown = set(keys(YAML(typ="safe").load((ROOT / "modalkit.yaml").read_text())))
    assert shown >= set(keys(Settings.load([], {}).model_dump()))


def test_later_sources_win_key_by_key() -> None:
    base = "app_settings: {batch_config: {max_batch_size: 1, wait_ms: 1, max_age_ms: 1}}"
    over = "app_settings: {batch_config: {wait_ms: 2, max_age_ms: 2}}"
    batch = load(base, over, APP_SETTINGS__BATCH_CONFIG__MAX_AGE_MS="3").app_settings.batch_config
    assert (batch.max_batch_size, batch.wait_ms, batch.max_age_ms, batch.max_queue_size) == (1, 2, 3, 10_000)


def test_arguments_go_before_variables_and_files(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("modalkit.yaml").write_text("app_settings: {app_prefix: file, batch_config: {wait_ms: 1, max_age_ms: 1}}")
    monkeypatch.setenv("MODALKIT_APP_SETTINGS__BATCH_CONFIG__WAIT_MS", "2")
    monkeypatch.setenv("MODALKIT_APP_SETTINGS__BATCH_CONFIG__MAX_AGE_MS", "2")
    app = Settings(app_settings={"batch_config": {"max_age_ms": 3}}).app_settings
    assert (app.app_prefix, app.batch_config.wait_ms, app.batch_config.max_age_ms) == ("file", 2, 3)


def test_a_wrong_argument_is_refused_as_one() -> None:
    with pytest.raises(SettingsError) as caught:
        Settings(app_settings={"batch_config": {"wait_ms": "soon"}}, app_setings={})
    assert "app_settings.batch_config.wait_ms: must be a number, not 'soon' (argument)" in str(caught.value)
    assert "app_setings: unknown key; did you mean app_settings? (argument)" in str(caught.value)


def test_files_are_named_by_a_variable_or_found_in_the_working_directory() -> None:
    Path("a.yaml").write_text("app_settings: {app_prefix: a, batch_config: {wait_ms: 1}}")
    Path("b.yaml").write_text("app_settings: {app_prefix: b}")
    app = Settings.load(environ={"MODALKIT_CONFIG": "a.yaml, b.yaml"}).app_settings
    assert (app.app_prefix, app.batch_config.wait_ms) == ("b", 1)
    assert Settings.load(environ={}).app_settings.app_prefix == "sentiment"
    Path("modalkit.yaml").write_text("app_settings: {app_prefix: here}")
    assert Settings.load(environ={}).app_settings.app_prefix == "here"
    assert Settings.load([], {}).app_settings.app_prefix == "sentiment"


@pytest.mark.parametrize("name", ["modalkit.yml", "Modalkit.YAML", "modalkit.json"])
def test_a_file_in_the_place_of_modalkit_yaml_is_refused_or_reported(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    Path(name).write_text("app_settings: {app_prefix: other}")
    with pytest.raises(
        SettingsError, match=rf"{name}: is not read: rename it to modalkit\.yaml, or name it by --config"
    ):
        Settings.load(environ={})
    assert Settings.load([name], {}).app_settings.app_prefix == "other"
    Path("modalkit.yaml").write_text("app_settings: {app_prefix: here}")
    assert Settings.load(environ={}).app_settings.app_prefix == "here"
    assert f"{name}: not read, because there is modalkit.yaml; remove it" in caplog.text


@pytest.mark.parametrize("name", ["missing.yaml", "a.yaml,missing.yaml"])
def test_a_file_that_is_named_but_missing_is_an_error(name: str) -> None:
    Path("a.yaml").touch()
    with pytest.raises(SettingsError, match=r"missing\.yaml: no such file, named in MODALKIT_CONFIG: create it"):
        Settings.load(environ={"MODALKIT_CONFIG": name})
    with pytest.raises(SettingsError, match="no such file: create it"):
        Settings.load(["missing.yaml"], {})


def test_a_file_of_a_user_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(SettingsError, match=r"~no-such-user/a\.yaml: begins with a user that does not exist, named in"):
        Settings.load(environ={"MODALKIT_CONFIG": "~no-such-user/a.yaml"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "app_settings: {batch_config: {max_batch_sise: 8}}",
            "max_batch_sise: unknown key; did you mean max_batch_size?",
        ),
        (
            "app_settings:\n  wait_ms: 8",
            "app_settings.wait_ms: unknown key; did you mean app_settings.batch_config.wait",
        ),
        ("batch: 1", "batch: unknown key"),
        ("app_settings: {batch_config: {max_batch_size: many}}", "max_batch_size: must be a whole number, not 'many'"),
        ("app_settings: {batch_config: {max_batch_size: yes}}", "max_batch_size: must be a number, not True"),
        ("app_settings: {batch_config: {max_batch_size: 0}}", "max_batch_size: must be at least 1, not 0"),
        ("app_settings: {batch_config: {wait_ms: -1}}", "wait_ms: must be at least 0, not -1"),
        ("app_settings: {batch_config: {wait_ms: .inf}}", "wait_ms: must be a number, not inf"),
        ("app_settings: {batch_config: 5}", "batch_config: must be a mapping"),
        ("app_settings: {app_prefix: 5}", "app_prefix: must be a text, not 5; write it in quotes"),
        ("app_settings: {app_prefix: 'a b'}", "app_prefix: must be 1 to 48 letters"),
        (f"app_settings: {{app_prefix: {'a' * 49}}}", "app_prefix: must be 1 to 48 letters"),
        ("app_settings: {auth_config: {auth_header: 'a b'}}", "auth_header: must be the name of an HTTP header"),
        ("app_settings: {auth_config: {auth_header: Content-Length}}", "auth_header: Content-Length has another use"),
        ("app_settings: {auth_config: {auth_header: X-Request-ID}}", "auth_header: X-Request-ID has another use"),
        (
            "app_settings: {auth_config: {keys: {a: {api_key: k, max_requests_per_second: 1e-309}}}}",
            "keys.a.max_requests_per_second: must be at least 1e-06, not '1e-309'",
        ),
        ("app_settings: {async_config: {result_ttl: 1.0e+13}}", "result_ttl: must be at most 3153600000"),
        ("app_settings: {async_config: {timeout: 1.0e+300}}", "timeout: must be at most 3153600000"),
        (
            "app_settings: {async_config: {store_path: ''}}",
            "store_path: must be the path of a file, not ''; for jobs in",
        ),
        ("app_settings: {async_config: {store_path: ':memory:'}}", "store_path: must be the path of a file, not ':mem"),
        ("app_settings: {async_config: {store_path: 'file:a?mode=memory'}}", "store_path: must be the path of a file"),
        ("app_settings: {async_config: {store: redis}}", "store: must be 'memory' or 'sqlite', not 'redis'"),
        ("app_settings: {queue_config: {backend: kafka}}", "backend: must be one of none, memory, sqs"),
        ("app_settings: {queue_config: {allowed_queues: all}}", "allowed_queues: must be a list"),
        ("model_settings: {model_entries: {a: {pipeline: my_module}}}", 'pipeline: must have the form "module:Class"'),
        ("model_settings: {model_entries: {a: {path: x}}}", "a.pipeline: is missing: add pipeline"),
        ("model_settings: {model_entries: {a: {pipelin: 'm:C'}}}", "a.pipelin: unknown key; did you mean pipeline?"),
        ("model_settings: {model_entries: {sentiment: {pipelin: 'm:C'}}}", "pipelin: unknown key; did you mean pipel"),
        (
            "model_settings: {model_entries: {a: {pipeline: 'm:C', batch_config: {max_batch_sise: 8}}}}",
            "a.batch_config.max_batch_sise: unknown key; did you mean max_batch_size?",
        ),
        (
            "model_settings: {model_entries: {a: {pipeline: 'm:C', batch_config: {max_batch_size: 10_001}}}}",
            "a.batch_config.max_batch_size: 10001 is more than",
        ),
        (
            "model_settings: {model_entries: {a: {pipeline: 'm:C', max_in_flight: 0}}}",
            "max_in_flight: must be at least",
        ),
        ("model_settings: {model_entries: {a: {pipeline: 'm:C', model_name: b}}}", "model_name: modalkit itself gives"),
        ("app_settings: {batch_config: {max_batch_size: 9, max_queue_size: 8}}", "max_batch_size: 9 is more than"),
        ("app_settings: {auth_config: {api_key: a, ssm_key: b}}", "ssm_key: api_key is given as well"),
        ("app_settings: {deployment_config: {gpu_snapshot: true}}", "gpu_snapshot: a GPU snapshot is part of a memory"),
        ("app_settings: {deployment_config: {min_containers: 11}}", "min_containers: 11 is more than max_containers"),
        ("app_settings: {queue_config: {backend: routing}}", "routes: backend routing needs at least one route"),
        ("app_settings: {queue_config: {backend: webhook}}", "allowed_hosts: the webhook backend sends to no host"),
        ("a: 1\na: 2", "line 2, column 1: a is given twice: keep one"),
        ("a: {yes: s3cret, true: 2}", 'line 1, column 18: found duplicate key "True": keep one'),
        ("a: &a {}\nb:\n  <<: *a\n  <<: *a", "line 4, column 3: b.<< is given twice: write <<: [*one, *other]"),
        ("a: [", "is not valid YAML: line 1"),
        ("- a", "must hold a mapping"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_path_and_place(text: str, message: str) -> None:
    said = refused(text)
    assert message in said
    assert "config0.yaml" in said


@pytest.mark.parametrize("header", ["", "%YAML 1.2\n---\n"], ids=["plain", "with a version"])
def test_values_mean_what_they_mean_in_yaml_1_1_whatever_version_the_file_names(header: str) -> None:
    """As PyYAML reads them, for which configuration files have been written: y and 1e3 are texts."""
    common = load(
        f"""{header}
        app_settings: {{deployment_config: {{secure: no, memory_snapshot: on}}}}
        model_settings:
          common:
            booleans: [yes, No, ON, off, true, "yes"]
            texts: [y, N, 1e3, 1.5e3, 1E-5, 0o17, 08]
            numbers: [017, 1_000, 1:30, 1.5e+3, 0x1e3, .5]
            y: null
            merged: {{<<: {{a: 1, b: 2}}, b: 3}}
        """
    )
    deployment = common.app_settings.deployment_config
    assert (deployment.secure, deployment.memory_snapshot) == (False, True)
    given = common.model_settings.common
    assert given["booleans"] == [True, False, True, False, True, "yes"]
    assert given["texts"] == ["y", "N", "1e3", "1.5e3", "1E-5", "0o17", "08"]
    assert given["numbers"] == [15, 1000, 90, 1500.0, 0x1E3, 0.5]
    assert (given["y"], given["merged"]) == (None, {"a": 1, "b": 3})
    assert [type(value) for value in given["numbers"]] == [int, int, int, float, int, float]


def test_everything_that_is_wrong_is_said_at_once_with_its_line() -> None:
    said = refused("app_settings:\n  app_prefix: ''\n  batch_config:\n    wait_ms: x\nfoo: 1", FOO="2")
    assert said.startswith("the configuration cannot be used:\n")
    for expected in ("config0.yaml, line 2", "config0.yaml, line 4", "(config0.yaml, line 5)", "(MODALKIT_FOO)"):
        assert expected in said


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("APP_SETTINGS__BATCH_CONFIG__WAIT_MSS", "1", "did you mean MODALKIT_APP_SETTINGS__BATCH_CONFIG__WAIT_MS?"),
        ("APP_SETTINGS__FOO", "1", "app_settings.foo: unknown key; remove it or correct its name (MODALKIT_APP"),
        ("BATCH_CONFIG__WAIT_MS", "1", "did you mean MODALKIT_APP_SETTINGS__BATCH_CONFIG"),
        ("APP_SETTINGS__BATCH_CONFIG__WAIT_MS", "soon", "wait_ms: must be a number, not 'soon' (MODALKIT_APP_SETTINGS"),
        ("APP_SETTINGS__QUEUE_CONFIG__ALLOWED_QUEUES", "[a", "is not valid YAML or JSON"),
        ("APP_SETTINGS__QUEUE_CONFIG__ALLOWED_QUEUES__0", "a", "a list is set as a whole"),
        ("", "1", "MODALKIT_: unknown key"),
    ],
)
def test_a_wrong_variable_is_refused_by_its_name(name: str, value: str, message: str) -> None:
    assert message in refused("", **{name: value})


def test_variables_hold_plain_values_null_lists_and_mappings() -> None:
    settings = load(
        "app_settings: {deployment_config: {gpu: A100}}",
        APP_SETTINGS__DEPLOYMENT_CONFIG__GPU="null",
        APP_SETTINGS__DEPLOYMENT_CONFIG__REGION='["eu", "us"]',
        APP_SETTINGS__DEPLOYMENT_CONFIG__SECURE="false",
        APP_SETTINGS__BUILD_CONFIG__ENV__LOG_LEVEL="debug",
        APP_SETTINGS__APP_PREFIX="123",
        MODEL_SETTINGS__COMMON="{device: cpu, threads: 2}",
    )
    deployment = settings.app_settings.deployment_config
    assert (deployment.gpu, deployment.region, deployment.secure) == (None, ["eu", "us"], False)
    assert settings.app_settings.build_config.env == {"LOG_LEVEL": "debug"}
    assert settings.app_settings.app_prefix == "123"
    common = settings.model_settings.common
    assert {key: common[key] for key in ("device", "dtype", "threads")} == {
        "device": "cpu",
        "dtype": "auto",
        "threads": 2,
    }


def test_variables_of_a_kubernetes_service_are_no_settings_and_others_of_such_names_are_refused() -> None:
    of_service = {
        "SERVICE_HOST": "10.0.0.7",
        "SERVICE_PORT": "80",
        "SERVICE_PORT_HTTP": "80",
        "PORT": "tcp://10.0.0.7:80",
        "PORT_80_TCP": "tcp://10.0.0.7:80",
        "PORT_80_TCP_PROTO": "tcp",
        "PORT_80_TCP_PORT": "80",
        "PORT_80_TCP_ADDR": "10.0.0.7",
    }
    beside = {f"GPU_{name}": value for name, value in of_service.items()}
    given = {"APP_SETTINGS__BUILD_CONFIG__ENV__MY_SERVICE_HOST": "example.com"}
    settings = load("", **of_service, **beside, **given)
    assert settings == load("", **given) != load("")
    assert "port: unknown key" in refused("", PORT="9000")


def test_model_names_keep_their_case_and_further_keys_are_the_pipelines() -> None:
    settings = load(
        "model_settings: {model_entries: {My-Model: {pipeline: 'm:C', model_path: ./x, options: {a: [1]}}}}",
        **{"MODEL_SETTINGS__MODEL_ENTRIES__My-Model__MAX_LENGTH": "64"},
    )
    (name, entry), *others = settings.model_settings.model_entries.items()
    assert (name, others) == ("My-Model", [])
    assert entry.arguments() == {"model_path": "./x", "options": {"a": [1]}, "max_length": 64}
    entry.arguments()["options"]["a"].append(2)
    assert entry.arguments()["options"] == {"a": [1]}


def test_the_bundled_model_can_be_changed_without_naming_its_pipeline() -> None:
    (entry,) = load(
        "model_settings: {model_entries: {sentiment: {max_length: 64}}}"
    ).model_settings.model_entries.values()
    assert entry.pipeline == "modalkit.pipelines.sentiment:SentimentPipeline"
    assert entry.arguments() == {"model_path": "bundled", "max_length": 64}


def test_limits_of_a_model_are_merged_over_those_of_the_application() -> None:
    settings = load(
        """
        app_settings: {batch_config: {max_batch_size: 20_000, max_queue_size: 50_000, calibration: {max_seconds: 1}}}
        model_settings:
          model_entries:
            a: {pipeline: "m:C", batch_config: {wait_ms: 7, calibration: {enabled: false}}}
            b: {pipeline: "m:C", max_in_flight: 3}
            c: {pipeline: "m:C", key: 1}
        """,
        MODEL_SETTINGS__MODEL_ENTRIES__a__BATCH_CONFIG__MAX_AGE_MS="5",
    )
    a, b, c = (settings.for_model(name).app_settings.batch_config for name in "abc")
    assert (a.max_batch_size, a.max_queue_size, a.wait_ms, a.max_age_ms) == (20_000, 50_000, 7, 5)
    assert (a.calibration.enabled, a.calibration.max_seconds) == (False, 1)
    assert (b.max_batch_size, b.max_in_flight, b.wait_ms) == (20_000, 3, 0)
    assert c == settings.app_settings.batch_config == settings.for_model("none").app_settings.batch_config
    assert [entry.arguments() for entry in settings.model_settings.model_entries.values()] == [{}, {}, {"key": 1}]


def test_limits_that_were_chosen_for_a_model_are_not_undone() -> None:
    """As those of ``modalkit tune``, which a worker applies the settings of a model to again."""
    chosen = load("model_settings: {model_entries: {a: {pipeline: 'm:C', batch_config: {wait_ms: 7}}}}").for_model("a")
    limits = chosen.app_settings.batch_config.model_copy(update={"wait_ms": 9})
    chosen = chosen.model_copy(update={"app_settings": chosen.app_settings.model_copy(update={"batch_config": limits})})
    assert chosen.for_model("a").app_settings.batch_config.wait_ms == 9


def test_a_wrong_limit_of_the_application_is_said_once() -> None:
    said = refused(
        "app_settings: {batch_config: {wait_ms: x}}\n"
        "model_settings: {model_entries: {a: {pipeline: 'm:C', batch_config: {max_batch_size: 1}}}}"
    )
    assert said.count("wait_ms") == 1


def test_the_origin_of_a_value_is_known_afterwards() -> None:
    settings = load("app_settings:\n  app_prefix: a", APP_SETTINGS__BATCH_CONFIG__WAIT_MS="5")
    assert settings.origin("app_settings", "app_prefix") == "config0.yaml, line 2"
    assert settings.origin("app_settings", "batch_config", "wait_ms") == "MODALKIT_APP_SETTINGS__BATCH_CONFIG__WAIT_MS"
    assert settings.origin("model_settings", "common") == "default"


def test_old_names_are_read_with_a_warning() -> None:
    text = (
        "app_settings: {deployment_config: {concurrency_limit: 3, container_idle_timeout: 60, "
        "allow_concurrent_inputs_handler: 90}}"
    )
    with pytest.warns(FutureWarning) as warned:
        settings = load(text, APP_SETTINGS__DEPLOYMENT_CONFIG__ALLOW_CONCURRENT_INPUTS="9")
    deployment = settings.app_settings.deployment_config
    assert (deployment.max_containers, deployment.scaledown_window, deployment.max_concurrent_inputs) == (3, 60, 9)
    said = [str(warning.message) for warning in warned]
    assert "concurrency_limit: is now called max_containers: rename it (config0.yaml, line 1)" in said[0]
    assert deployment.max_concurrent_requests == 90
    assert "allow_concurrent_inputs_handler: is now called max_concurrent_requests: rename it" in said[2]
    assert len(said) == 4
    both = "app_settings: {deployment_config: {concurrency_limit: 3, max_containers: 4}}"
    assert "is the old name of max_containers, which is given too: remove it" in refused(both)


def test_a_heading_with_nothing_below_it_leaves_the_defaults() -> None:
    assert load("app_settings:\n  batch_config:\nmodel_settings:\n") == Settings.load([], {})
    assert "app_prefix: must be a text, not null" in refused("app_settings: {app_prefix: null}")


def test_secrets_are_shown_nowhere() -> None:
    settings = load("app_settings: {auth_config: {api_key: s3cret}}")
    assert settings.app_settings.auth_config.api_key is not None
    assert settings.app_settings.auth_config.api_key.get_secret_value() == "s3cret"
    assert "s3cret" not in repr(settings) + str(settings.model_dump())
    assert "hunter2" not in repr(load("app_settings: {queue_config: {broker_url: 'redis://:hunter2@host'}}"))
    assert "api_key: must not be empty (" in refused("app_settings: {auth_config: {api_key: ''}}")
    assert "12345" not in refused("app_settings: {auth_config: {api_key: 12345}}")
    assert "s3cret" not in refused("app_settings: {auth_config: {api_kee: s3cret}}")
    webhook = "app_settings: {queue_config: {webhook: {allowed_hosts: ['https://hooks.example.com/s3cret']}}}"
    said = refused(webhook)
    assert "allowed_hosts.0: must be a host alone, as in hooks.example.com" in said
    assert "s3cret" not in said


def test_settings_are_frozen() -> None:
    settings = Settings.load([], {})
    with pytest.raises(ValidationError, match="frozen"):
        settings.app_settings.batch_config.wait_ms = 5  # type: ignore[misc]  # that is the point
    with pytest.raises(ValidationError, match="frozen"):
        settings.app_settings = settings.app_settings  # type: ignore[misc]  # as above


def test_merging_changes_neither_side() -> None:
    base, over = {"a": {"b": 1, "c": [1]}, "d": 1}, {"a": {"c": [2]}, "d": {"e": 2}}
    before = copy.deepcopy((base, over))
    assert deep_merge(base, over) == {"a": {"b": 1, "c": [2]}, "d": {"e": 2}}
    assert (base, over) == before


def test_the_fragment_of_the_documentation_loads() -> None:
    fragment = """
    app_settings:
      queue_config:
        backend: "memory"
      async_config:
        timeout: 3600
        result_ttl: 86400
    """
    assert load(fragment) == Settings.load([], {})


def every_section(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from every_section(field.annotation)


def test_every_setting_says_what_it_does() -> None:
    sections: list[type[BaseModel]] = [*every_section(Settings), ModelEntry]
    for section in sections:
        for name, field in section.model_fields.items():
            inner = section_in(field.annotation)
            assert field.description or (inner is not None and inner.__doc__), f"{section.__name__}.{name}"


@pytest.mark.parametrize(
    ("deployment", "key", "message"),
    [
        ("{max_concurrent_inputs: 8, target_concurrent_inputs: 9}", "target_concurrent_inputs", "9 is more than max_"),
        ("{scaledown_window: 1}", "scaledown_window", "Modal takes 2 to 3600 seconds, not 1"),
        ("{volumes: {data: a}}", "volumes.data", "must be an absolute path in the container"),
        ("{volumes: {/a/../b: a}}", "volumes./a/../b", "must be an absolute path in the container"),
        ("{volumes: {/root: a}}", "volumes./root", "Modal mounts nothing at /root"),
        (
            "{volumes: {/a: one, /b: one}}",
            "volumes./b",
            "Modal mounts a volume in one place only, and 'one' is at /a too",
        ),
        (
            "{cloud_bucket_mounts: [{mount_point: data, bucket_name: a}]}",
            "cloud_bucket_mounts.0.mount_point",
            "must be an absolute path in the container",
        ),
        (
            "{volumes: {/a: one}, cloud_bucket_mounts: [{mount_point: /a/, bucket_name: a}]}",
            "cloud_bucket_mounts.0.mount_point",
            "/a is taken by another volume or bucket",
        ),
    ],
)
def test_a_deployment_that_modal_would_refuse_is_refused(deployment: str, key: str, message: str) -> None:
    said = refused(f"app_settings: {{deployment_config: {deployment}}}")
    assert f"app_settings.deployment_config.{key}: {message}" in said


@pytest.mark.parametrize(
    ("build", "message"),
    [
        ("{python_modules: [my-module]}", "python_modules.0: must be the name of a Python module"),
        ("{python_modules: [a, 'b..c']}", "python_modules.1: must be the name of a Python module"),
        ("{workdir: app}", "workdir: must be an absolute path in the container"),
    ],
)
def test_an_image_that_cannot_be_built_is_refused(build: str, message: str) -> None:
    assert f"app_settings.build_config.{message}" in refused(f"app_settings: {{build_config: {build}}}")


def test_the_default_limits_of_batches_are_those_of_the_policy() -> None:
    assert batch_policy(BatchConfig()) == BatchPolicy()
