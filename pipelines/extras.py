"""How an extra of modalkit is installed, for messages."""

import json
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname


def install_command(extra: str) -> str:
    """The command that installs an extra, from the clone or the wheel that modalkit was installed from.

    By its name alone pip would install another project, which has that name on the public package index.
    """
    source, is_editable = _source()
    if source is None:
        return f"pip install '/path/to/modalkit[{extra}]' (the folder of a clone, or a wheel)"
    return f"pip install {'-e ' if is_editable else ''}'{source}[{extra}]'"


def _source() -> tuple[Path | None, bool]:
    """Where the installed modalkit is from, if that is a local path that is still there, and whether it is editable."""
    try:
        record = json.loads(metadata.distribution("modalkit").read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, OSError, ValueError):
        record = {}
    url = urlsplit(record.get("url", ""))
    path = Path(url2pathname(url.path))
    is_there = url.scheme == "file" and path.exists()
    return path if is_there else None, bool(record.get("dir_info", {}).get("editable"))
