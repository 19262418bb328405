"""How much memory this process uses of its own, and how much more it may use, where Linux tells."""

import re
from contextlib import suppress
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
"""Where Linux tells the limits of control groups; in a container, of its own."""
OWN_GROUP = Path("/proc/self/cgroup")


def private_bytes() -> int:
    """Bytes of memory that belong to this process alone: without files that it maps; 0 where that is not known."""
    return _kibibytes(Path("/proc/self/status"), "RssAnon") or 0


def free_bytes() -> int | None:
    """Bytes that may still be used: of the machine or, where that is less, of a control group; None where not known."""
    free = [_kibibytes(Path("/proc/meminfo"), "MemAvailable")]
    for group in control_groups(CGROUP):
        with suppress(OSError, ValueError):  # "max" is no limit
            limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
            cached = re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
            free.append(limit - used + (int(cached[1]) if cached else 0))
    return min((each for each in free if each is not None), default=None)


def control_groups(root: Path) -> list[Path]:
    """The groups of this process, from its own to `root`; the limits of all of them count (version 2).

    A container sees one, which is `root`. A service of systemd has one of its own.
    """
    own: re.Match[str] | None = None
    with suppress(OSError):
        own = re.search(r"^0::/(.*)$", OWN_GROUP.read_text(encoding="utf-8"), re.MULTILINE)
    group = root / own[1] if own else root
    return [group, *(parent for parent in group.parents if parent.is_relative_to(root))]


def _kibibytes(file: Path, name: str) -> int | None:
    with suppress(OSError):
        if found := re.search(rf"^{name}:\s*(\d+) kB", file.read_text(), re.MULTILINE):
            return int(found[1]) * 1024
    return None
