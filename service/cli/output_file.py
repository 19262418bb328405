"""An output file that is there as a whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from service.cli.common import notices


@contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """A stream whose content takes the place of `path` when the block ends well.

    Until then the file stays as it was, so it may be the input as well. What had been written when the block raised is
    kept beside it, and a notice tells where. What is no regular file (a pipe, a terminal) is written to at once. Raises
    ``OSError`` at once where nothing can be written.
    """
    target = path.resolve()
    if target.exists() and not target.is_file():
        with path.open("w", encoding="utf-8", newline="") as stream:
            yield stream
        return
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        with partial.open("x", encoding="utf-8", newline="") as stream:
            if target.exists():
                shutil.copymode(target, partial)
            yield stream
        partial.replace(target)
    except BaseException:
        if partial.exists() and partial.stat().st_size:
            notices.print(f"{path} is left as it was; what there is of the results is in {partial}")
        else:
            partial.unlink(missing_ok=True)
        raise
