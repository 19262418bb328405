"""How much memory there is, as Linux tells."""

from pathlib import Path

import pytest

from modalkit.pipelines import memory


def test_memory_that_a_process_takes_is_counted_as_its_own() -> None:
    before = memory.private_bytes()
    taken = bytearray(b"x" * 200_000_000)
    assert memory.private_bytes() - before > 0.9 * len(taken)


def test_the_limit_of_a_container_counts_without_what_it_could_give_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_machine = memory.free_bytes()
    assert of_machine is not None
    assert of_machine > 0
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(memory, "OWN_GROUP", tmp_path / "own")
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("800000\n")
    (tmp_path / "memory.stat").write_text("anon 500000\ninactive_file 300000\n")
    assert memory.free_bytes() == 500_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_bytes() != 500_000
    (tmp_path / "own").write_text("0::/a.service\n")
    (tmp_path / "a.service").mkdir()
    for name, text in {"max": "900000\n", "current": "800000\n", "stat": "anon 800000\n"}.items():
        (tmp_path / "a.service" / f"memory.{name}").write_text(text)
    assert memory.free_bytes() == 100_000
