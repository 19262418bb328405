"""Writes files so that readers see the old one or the new one, whole."""

import errno
import glob
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

ABANDONED_S = 3600
"""Seconds since its last change after which a new file is of a process that was killed."""
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path for a new file, which takes the place of `target`, with its permissions, when the block ends.

    When the block raises, what was written there is removed, and `target` stays as it was. What processes that were
    killed left beside `target` is removed too.
    """
    new = target.with_name(f"{target.name}.{uuid4().hex[:8]}.tmp")
    try:
        with naming_full_disk(target):
            for left in target.parent.glob(f"{glob.escape(target.name)}.{'[0-9a-f]' * 8}.tmp"):
                with suppress(OSError):  # another process removes it or has finished it, or it is another user's
                    if time.time() - left.stat().st_mtime > ABANDONED_S:
                        left.unlink()
            yield new
            if target.exists():
                shutil.copymode(target, new)
            new.replace(target)
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def naming_full_disk(file: Path | str) -> Iterator[None]:
    """Errors that say that there is no space get the name of the file, which the operating system does not tell."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE and error.filename is None:
            error.filename = str(file)
        raise
