"""What a container's image holds, and that Modal's client takes it in this order."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from modalkit.service.loading import LoadError
from modalkit.service.on_modal.image import ImagePlan, build_image, plan_image
from modalkit.service.on_modal.image_code import LocalPath, pinned
from modalkit.service.settings import Settings
from tests.support.modal_objects import image_layers, local_files


def plan(text: str = "{}", **variables: str) -> ImagePlan:
    """The plan for a configuration in the working directory of the test."""
    Path("modalkit.yaml").write_text(text)
    return plan_image(Settings.load(environ=variables), environ=variables, folder=Path.cwd())


def build(**config: Any) -> str:
    return f"app_settings:\n  build_config: {json.dumps(config)}\n"


def model(**entry: Any) -> dict[str, Any]:
    return {
        "model_settings": {
            "model_entries": {"mine": {"pipeline": "modalkit.pipelines.sentiment:SentimentPipeline"} | entry}
        }
    }


def users_paths(planned: ImagePlan) -> dict[str, Path]:
    return {
        path.remote: path.local
        for path in planned.local_paths
        if not path.remote.startswith("/root/modalkit/")
        and path.remote != "/root/modalkit"
        and "modalkit_config" not in path.remote
    }


def test_the_image_is_built_before_local_files_are_added() -> None:
    Path("data.txt").write_text("data")
    config = {
        "app_settings": {
            "build_config": {"env": {"A": "b"}, "extra_run_commands": ["apt-get update", "apt-get install -y git"]},
            "deployment_config": {
                "mounts": [{"local_path": "data.txt", "remote_path": "/data/"}],
                "secrets": ["hub-token"],
            },
        },
    } | model(model_path="acme/reviews")
    planned = plan(json.dumps(config))
    image = build_image(planned)
    layers = image_layers(image)
    built = ["from_registry", "workdir", "env", "uv_pip_install", "run_commands", "run_commands"]
    assert layers == [*built, *["Image(local files"] * len(planned.local_paths)]
    assert [next(iter(step)) for step in planned.steps()][: len(built)] == built
    assert local_files(image)["/data/data.txt"] == str(Path("data.txt").resolve())


def test_the_containers_code_has_its_data_and_no_leftovers() -> None:
    files = local_files(build_image(plan()))
    for needed in (
        "modalkit/batching/scheduler.py",
        "modalkit/benchmarks/corpus/mixed_length.txt.gz",
        "modalkit/modal_config.py",
        "modalkit/pipelines/sentiment_model/model.safetensors",
        "modalkit/pipelines/sentiment_model/tokenizer.json",
        "modalkit/service/on_modal/config.py",
        "modalkit/py.typed",
    ):
        assert f"/root/{needed}" in files
    assert not [file for file in files if file.endswith((".pyc", ".png")) or "/results/" in file or "/." in file]


def test_dependencies_are_pinned_to_what_is_installed_here() -> None:
    requirements = {Requirement(line).name: line for line in plan().requirements}
    assert requirements["pydantic"].startswith("pydantic==2.")
    assert "+" not in requirements["torch"]
    assert "==" in requirements["transformers"]
    assert "pytest" not in requirements
    assert "taskiq" not in requirements


def test_what_is_not_installed_stays_a_range_and_markers_are_those_of_the_container() -> None:
    lines = [
        "no-such-distribution>=2,<3",
        'winloop>=1; sys_platform == "win32"',
        'uvloop>=0.1; sys_platform == "linux"',
        'anyio>=4; extra == "more"',
        'httpx>=0.1; extra == "other"',
    ]
    names = [Requirement(line).name for line in pinned(lines, {"more"}, "3.11")]
    assert names == ["anyio", "no-such-distribution", "uvloop"]
    assert "no-such-distribution<3,>=2" in pinned(lines, set(), "3.11")


def test_what_is_installed_here_for_a_newer_python_is_another_version_in_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, python in (("newest", ">=3.12"), ("older", ">=3.9.1")):
        (tmp_path / f"{name}-2.5.dist-info").mkdir()
        (tmp_path / f"{name}-2.5.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.4\nName: {name}\nVersion: 2.5\nRequires-Python: {python}\n"
        )
    monkeypatch.syspath_prepend(tmp_path)
    lines = ["newest>=2", "older>=2", 'backport>=1; python_version < "3.12"']
    assert pinned(lines, set(), "3.11") == ("backport>=1", "newest>=2", "older==2.5")
    assert pinned(lines, set(), "3.13") == ("newest==2.5", "older==2.5")


@pytest.mark.parametrize(
    ("image", "is_pinned"),
    [
        ("python:3.11-slim", False),
        ("docker.io/library/python:3.12", True),
        ("nvidia/cuda:13.0.1-devel-ubuntu24.04", True),
    ],
)
def test_the_python_of_the_container_is_that_of_its_image_where_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: str, is_pinned: bool
) -> None:
    (tmp_path / "modalkit-9.dist-info").mkdir()
    (tmp_path / "modalkit-9.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.4\nName: modalkit\nVersion: 9\nRequires-Dist: newest>=2\n"
    )
    here = "{}.{}".format(*sys.version_info)
    python = here if image.startswith("nvidia") else "3.12"
    (tmp_path / "newest-2.5.dist-info").mkdir()
    (tmp_path / "newest-2.5.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.4\nName: newest\nVersion: 2.5\nRequires-Python: >={python}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert plan(build(image=image)).requirements == (("newest==2.5",) if is_pinned else ("newest>=2",))


@pytest.mark.parametrize(
    ("config", "needed"),
    [
        ("{queue_config: {backend: taskiq}}", "taskiq-redis"),
        ("{queue_config: {backend: routing, routes: {a: memory, b: taskiq}}}", "taskiq-redis"),
        ("{queue_config: {backend: sqs}}", "aiobotocore"),
        ("{auth_config: {ssm_key: /service/key}}", "aiobotocore"),
    ],
)
def test_what_the_configuration_needs_is_installed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str, needed: str
) -> None:
    (tmp_path / "modalkit-9.dist-info").mkdir()
    (tmp_path / "modalkit-9.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.4\nName: modalkit\nVersion: 9\nProvides-Extra: aws\nProvides-Extra: taskiq\n"
        "Requires-Dist: modal>=1\n"
        'Requires-Dist: aiobotocore>=3; extra == "aws"\nRequires-Dist: taskiq-redis>=1.2; extra == "taskiq"\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    (requirement,) = plan(f"app_settings: {config}").requirements
    assert Requirement(requirement).name == needed


def test_an_old_installation_that_lacks_an_extra_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "modalkit-0.dist-info").mkdir()
    (tmp_path / "modalkit-0.dist-info" / "METADATA").write_text("Metadata-Version: 2.4\nName: modalkit\nVersion: 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(LoadError, match=r"the extra taskiq installs, .* pip install .*\[taskiq\]'"):
        plan("app_settings: {queue_config: {backend: taskiq}}")


@pytest.mark.parametrize(
    ("config", "base"),
    [
        ({}, "python:3.11-slim"),
        ({"image": "nvcr.io/nvidia/pytorch", "tag": "25.01-py3"}, "nvcr.io/nvidia/pytorch:25.01-py3"),
        ({"image": "localhost:5000/mine", "tag": "2"}, "localhost:5000/mine:2"),
        ({"image": "mine:1", "tag": "2"}, "mine:1"),
        ({"image": "mine@sha256:0", "tag": "2"}, "mine@sha256:0"),
    ],
)
def test_the_tag_holds_where_the_image_names_none(config: dict[str, str], base: str) -> None:
    assert plan(build(**config)).base == base


@pytest.mark.parametrize(
    ("commands", "expected"), [("echo one", ("echo one",)), (["echo one", "echo two"], ("echo one", "echo two"))]
)
def test_commands_are_one_or_a_list(commands: object, expected: tuple[str, ...]) -> None:
    assert plan(build(extra_run_commands=commands)).run_commands == expected


def test_the_users_modules_are_copied_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path.cwd())
    for file in ("reviews/__init__.py", "reviews/data.json", "reviews/__pycache__/x.pyc", "lone.py", "named.py"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).touch()
    config = build(python_modules=["named", "reviews.deep"]) + (
        "  queue_config: {backend: 'lone:Backend'}\n"
        "model_settings: {model_entries: {a: {pipeline: 'reviews.model:Model', input_model: 'reviews.io:Review'},"
        " b: {pipeline: 'modalkit.pipelines.sentiment:SentimentPipeline', output_model: 'json:Thing'}}}"
    )
    planned = plan(config)
    assert users_paths(planned) == {
        "/root/lone.py": Path("lone.py").resolve(),
        "/root/named.py": Path("named.py").resolve(),
        "/root/reviews": Path("reviews").resolve(),
    }
    files = local_files(build_image(planned))
    assert "/root/reviews/data.json" in files
    assert "/root/reviews/__pycache__/x.pyc" not in files


def test_a_module_is_found_in_the_working_folder_wherever_python_looks() -> None:
    Path("beside_it.py").touch()
    assert users_paths(plan(build(python_modules=["beside_it"]))) == {
        "/root/beside_it.py": Path("beside_it.py").resolve()
    }


def test_a_former_name_of_ours_is_ours_unless_the_user_has_that_module(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in configurations from before all of modalkit was one package."""
    former = json.dumps(model(pipeline="pipelines.sentiment:SentimentPipeline", model_path="acme/reviews"))
    planned = plan(former)
    assert users_paths(planned) == {}
    assert planned.downloads == ("hf download acme/reviews",)
    monkeypatch.syspath_prepend(Path.cwd())
    mine = Path("pipelines").resolve()
    mine.mkdir()
    (mine / "__init__.py").touch()
    assert users_paths(plan(former)) == {}
    (mine / "sentiment.py").touch()
    planned = plan(former)
    assert users_paths(planned) == {"/root/pipelines": mine}
    assert planned.downloads == ()


def test_a_module_that_was_installed_becomes_a_requirement() -> None:
    planned = plan("app_settings: {queue_config: {backend: 'hypothesis.stateful:Bundle'}}")
    assert not users_paths(planned)
    assert [line for line in planned.requirements if line.startswith("hypothesis==")]


def test_local_modules_that_are_imported_come_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path.cwd())
    monkeypatch.syspath_prepend(Path.cwd() / "env" / "lib" / "site-packages")
    monkeypatch.syspath_prepend(Path.cwd() / "other")
    for file in (
        "app_helpers.py",
        "app_package/inner.py",
        "env/lib/site-packages/installed_module.py",
        "other/pyvenv.cfg",
        "other/in_environment.py",
    ):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).touch()
    names = ["app_helpers", "app_package", "app_package.inner", "installed_module", "in_environment"]
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
        __import__(name)
    try:
        assert set(users_paths(plan())) == {"/root/app_helpers.py", "/root/app_package"}
    finally:
        for name in names:
            del sys.modules[name]


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (
            "model_settings: {model_entries: {a: {pipeline: 'nowhere.at_all:Model'}}}",
            "model_settings.model_entries.a.pipeline",
        ),
        ("app_settings: {queue_config: {backend: 'nowhere:Backend'}}", "app_settings.queue_config.backend"),
        (
            "app_settings: {queue_config: {backend: routing, routes: {'a*': 'nowhere:Backend'}}}",
            "app_settings.queue_config.routes.a*",
        ),
        (
            "app_settings: {build_config: {python_modules: [json, nowhere]}}",
            "app_settings.build_config.python_modules.1",
        ),
    ],
)
def test_a_missing_module_is_refused_with_its_key(config: str, key: str) -> None:
    with pytest.raises(LoadError) as caught:
        plan(config)
    assert str(caught.value).startswith(f"{key}: there is no module 'nowhere'")


def test_the_files_of_the_configuration_are_copied_in_order() -> None:
    Path("elsewhere").mkdir()
    Path("elsewhere/modalkit.yaml").write_text("app_settings: {build_config: {workdir: /app}}")
    paths = plan("{}", MODALKIT_CONFIG="modalkit.yaml, elsewhere/modalkit.yaml").local_paths
    assert [(path.remote, path.local) for path in paths if not path.is_folder] == [
        ("/app/modalkit_config/0-modalkit.yaml", Path("modalkit.yaml").resolve()),
        ("/app/modalkit_config/1-modalkit.yaml", Path("elsewhere/modalkit.yaml").resolve()),
    ]


def test_a_missing_file_of_the_configuration_is_refused() -> None:
    environ = {"MODALKIT_CONFIG": "gone.yaml"}
    with pytest.raises(LoadError, match=r"MODALKIT_CONFIG: there is no file .*gone\.yaml"):
        plan_image(Settings.load([], {}), environ=environ, folder=Path.cwd())


def make_models(*folders: str) -> None:
    for folder in folders:
        Path(folder).mkdir(parents=True)
        (Path(folder) / "config.json").touch()


@pytest.mark.parametrize(
    ("repository", "path", "folder", "remote"),
    [
        ("models", "bert", "models/bert", "/app/models/bert"),
        ("./models/", "./acme/bert", "models/acme/bert", "/app/models/acme/bert"),
        ("models", "beside/bert", "beside/bert", "/app/beside/bert"),
        ("/{cwd}/store", "bert", "store/bert", "{cwd}/store/bert"),
        ("models", "{cwd}/bert", "bert", "{cwd}/bert"),
    ],
)
def test_a_model_of_this_machine_is_where_it_is_looked_for(
    repository: str, path: str, folder: str, remote: str
) -> None:
    make_models(folder)
    cwd = str(Path.cwd())
    config = model(model_path=path.replace("{cwd}", cwd)) | {"app_settings": {"build_config": {"workdir": "/app"}}}
    config["model_settings"]["local_model_repository_folder"] = repository.replace("/{cwd}", cwd)
    (copy,) = [one for one in plan(json.dumps(config)).local_paths if one.local == Path(folder).resolve()]
    assert copy.remote == remote.replace("{cwd}", cwd)
    config["app_settings"]["build_config"]["bake_models"] = False
    assert copy not in plan(json.dumps(config)).local_paths


@pytest.mark.parametrize(
    ("entry", "command"),
    [
        ({"model_path": "acme/reviews"}, "hf download acme/reviews"),
        ({"model_path": "acme/e", "pipeline": "modalkit.pipelines.embedding:EmbeddingPipeline"}, "hf download acme/e"),
        (
            {"model_path": "acme/reviews", "revision": "v1; rm -rf /"},
            "hf download acme/reviews --revision 'v1; rm -rf /'",
        ),
    ],
)
def test_a_model_of_the_hub_is_downloaded_with_the_secrets(entry: dict[str, str], command: str) -> None:
    config = model(**entry) | {"app_settings": {"deployment_config": {"secrets": ["hub-token"]}}}
    planned = plan(json.dumps(config))
    assert planned.downloads == (command,)
    assert {"run_commands": [command], "secrets": ["hub-token"]} in list(planned.steps())


@pytest.mark.parametrize(
    "config",
    [
        model(model_path="bundled"),
        model(model_path="./not/there"),
        model(model_path="/volume/bert") | {"app_settings": {"deployment_config": {"volumes": {"/volume": "v"}}}},
        model(model_path="bert") | {"app_settings": {"deployment_config": {"volumes": {"/root/models": "v"}}}},
        model(model_path="/b/bert")
        | {"app_settings": {"deployment_config": {"cloud_bucket_mounts": [{"mount_point": "/b", "bucket_name": "b"}]}}},
        model(model_path="acme/reviews") | {"app_settings": {"build_config": {"bake_models": False}}},
        model(model_path="acme/reviews")
        | {
            "app_settings": {
                "build_config": {"env": {"HF_HOME": "/cache/hf"}},
                "deployment_config": {"volumes": {"/cache": "v"}},
            }
        },
        {"model_settings": {"model_entries": {"a": {"pipeline": "json:Model", "model_path": "acme/reviews"}}}},
    ],
)
def test_other_models_come_in_other_ways(config: dict[str, Any]) -> None:
    planned = plan(json.dumps(config))
    assert planned.downloads == ()
    assert not users_paths(planned)


def test_mounts_become_files_and_folders_of_the_image() -> None:
    Path("folder").mkdir()
    Path("folder/inside.txt").touch()
    Path("file.txt").touch()
    planned = plan(
        "app_settings: {build_config: {workdir: /app}, deployment_config: {mounts: ["
        "{local_path: file.txt, remote_path: there.txt}, {local_path: folder, remote_path: /data, type: dir}]}}"
    )
    assert users_paths(planned) == {
        "/app/there.txt": Path("file.txt").resolve(),
        "/data": Path("folder").resolve(),
    }
    files = local_files(build_image(planned))
    assert {"/app/there.txt", "/data/inside.txt"} <= set(files)


@pytest.mark.parametrize("mount", ["{local_path: gone, remote_path: /a}", "{local_path: ., remote_path: /a}"])
def test_a_mount_of_what_is_not_there_is_refused(mount: str) -> None:
    with pytest.raises(LoadError, match=r"^app_settings\.deployment_config\.mounts\.0\.local_path: there is no file "):
        plan(f"app_settings: {{deployment_config: {{mounts: [{mount}]}}}}")


def test_a_plan_is_plain_and_equal_when_made_again() -> None:
    assert plan() == plan()
    assert isinstance(plan().local_paths[0], LocalPath)
