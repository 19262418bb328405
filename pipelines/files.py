"""Writes files so that readers see the old one or the new one, whole."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path for a new file, which takes the place of `target`, with its permissions, when the block ends.

    When the block raises, what was written there is removed, and `target` stays as it was.
    """
    new = target.with_name(f"{target.name}.{uuid4().hex[:8]}.tmp")
    try:
        yield new
        if target.exists():
            shutil.copymode(target, new)
        new.replace(target)
    finally:
        new.unlink(missing_ok=True)
