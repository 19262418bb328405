"""An output file that is there as a whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TextIO

from modalkit.service.cli.common import notices


@contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """A stream whose content takes the place of `path` when the block ends well.

    Until then the file stays as it was, so it may be the input as well. What had been written when the block raised is
    kept beside it, and a notice tells where. What is no regular file (a pipe, a terminal) is written to at once. Raises
    ``OSError`` at once where nothing can be written.
    """
    if path.exists() and not path.is_file():
        with path.open("w", encoding="utf-8", newline="") as special:
            yield special
        return
    target = path.resolve()
    partial, stream = _open_beside(target)
    try:
        with stream:
            if target.exists():
                shutil.copymode(target, partial)
            yield stream
        partial.replace(target)
    except BaseException:
        if partial.stat().st_size:
            notices.print(f"{path} is left as it was; what there is of the results is in {partial}")
        else:
            partial.unlink()
        raise


def _open_beside(target: Path) -> tuple[Path, TextIO]:
    """A new file in the folder of `target`, under the first name that is free."""
    for number in count():
        partial = target.with_name(f"{target.name}.{number}.partial")
        try:
            return partial, partial.open("x", encoding="utf-8", newline="")
        except FileExistsError:
            continue
    raise AssertionError("unreachable: there is always another number")
