"""Limits are put into a file of the user's, which otherwise stays as it is."""

from pathlib import Path

import pytest

from modalkit.service.errors import UsageError
from modalkit.service.settings import Settings, SettingsError
from modalkit.service.tuning import TuningError
from modalkit.service.tuning.config_file import require_writable, text_with_limits

VALUES: dict[str, int | float] = {"max_batch_size": 64, "max_batch_seconds": 0.05}


def write_limits(path: Path, values: dict[str, int | float]) -> None:
    path.write_text(text_with_limits(path, values))


def test_comments_order_and_other_keys_stay(tmp_path: Path) -> None:
    path = tmp_path / "modalkit.yaml"
    path.write_text(
        "# ours\n"
        "model_settings:  # first\n"
        "    common: {device: cpu, threads: null}\n"
        "app_settings:\n"
        "    app_prefix: 'quoted'  # why\n"
        "    deployment_config:\n"
        "        secrets:\n"
        "            - one\n"
        "            - two\n"
        "    batch_config:\n"
        "        wait_ms: 3\n"
        "        max_batch_size: 32  # why so many\n"
        "\n"
        "    # the queues\n"
        "    queue_config: {allowed_queues: ['*']}\n"
    )
    expected = (
        path.read_text()
        .replace("size: 32", "size: 64")
        .replace("  wait_ms", "  max_batch_seconds: 0.05\n        wait_ms")
    )
    write_limits(path, VALUES)
    assert path.read_text() == expected


def test_limits_of_one_model_go_to_its_entry(tmp_path: Path) -> None:
    path = tmp_path / "modalkit.yaml"
    entry = "model_settings:\n  model_entries:\n    a:\n      pipeline: m:C\n      batch_config: {wait_ms: 2} # mine\n"
    path.write_text(entry)
    section = ("model_settings", "model_entries", "a", "batch_config")
    require_writable(path, section)
    path.write_text(text_with_limits(path, {"max_batch_size": 64}, section))
    assert path.read_text() == entry.replace("{wait", "{max_batch_size: 64, wait")
    limits = Settings.load([path], environ={}).for_model("a").app_settings.batch_config
    assert (limits.max_batch_size, limits.wait_ms) == (64, 2)
    with pytest.raises(SettingsError, match="is missing: add pipeline"):
        require_writable(tmp_path / "other.yaml", section)


def test_in_our_own_complete_file_only_the_values_change(tmp_path: Path) -> None:
    path = tmp_path / "modalkit.yaml"
    before = (Path(__file__).parents[3] / "modalkit.yaml").read_text()
    path.write_text(before)
    write_limits(path, VALUES)
    changed = [
        pair for pair in zip(before.splitlines(), path.read_text().splitlines(), strict=True) if pair[0] != pair[1]
    ]
    assert [new.split("#")[0].strip() for _, new in changed] == ["max_batch_size: 64", "max_batch_seconds: 0.05"]
    assert all(new.partition("#")[2] == old.partition("#")[2] for old, new in changed)


@pytest.mark.parametrize(
    "before",
    [
        None,
        "",
        "# a comment\n",
        "app_settings:\n",
        "app_settings:\n  batch_config:\n  app_prefix: x\n",
        "app_settings: {batch_config: {max_batch_size: 2}}\n",
        "base: &base\n  wait_ms: 1\n".replace("base: &base", "app_settings:\n  batch_config: &limits").replace(
            "  wait", "    wait"
        ),
        "model_settings: {model_entries: {a: {pipeline: 'a:B', k: 010, f: 1e3, b: 'yes', t: '12:30'}}}\n",
    ],
)
def test_what_was_written_is_loaded(tmp_path: Path, before: str | None) -> None:
    path = tmp_path / "new.yaml"
    if before is not None:
        path.write_text(before)
    require_writable(path)
    write_limits(path, VALUES)
    batch_config = Settings.load([path], environ={}).app_settings.batch_config
    assert batch_config.max_batch_size == 64
    assert batch_config.max_batch_seconds == 0.05
    assert path.read_text().startswith((before or "") if (before or "").startswith("#") else "")


def test_writing_twice_changes_nothing_more(tmp_path: Path) -> None:
    path = tmp_path / "new.yaml"
    write_limits(path, VALUES)
    first = path.read_text()
    write_limits(path, VALUES)
    assert path.read_text() == first


@pytest.mark.parametrize("content", ["services: {web: {image: nginx}}\n", "- a\n- b\n", "a: [\n"])
def test_a_file_that_is_no_configuration_is_refused_and_stays(tmp_path: Path, content: str) -> None:
    path = tmp_path / "compose.yaml"
    path.write_text(content)
    with pytest.raises(SettingsError, match=r"compose\.yaml"):
        require_writable(path)
    with pytest.raises(SettingsError):
        write_limits(path, VALUES)
    assert path.read_text() == content


def test_a_combination_that_would_not_load_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text("app_settings: {batch_config: {max_batch_size: 4, max_queue_size: 16}}\n")
    with pytest.raises(SettingsError, match="max_queue_size"):
        write_limits(path, VALUES)
    assert "max_batch_size: 4" in path.read_text()


def test_a_change_that_would_reach_further_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "shared.yaml"
    path.write_text(
        "model_settings: {model_entries: {a: {pipeline: 'a:B', limits: &limits {wait_ms: 1}}}}\n"
        "app_settings: {batch_config: *limits}\n"
    )
    with pytest.raises(TuningError, match=r"without changing more.* by hand: max_batch_size: 64"):
        write_limits(path, VALUES)
    assert "64" not in path.read_text()


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="create it first"):
        require_writable(tmp_path / "nowhere" / "modalkit.yaml")
