"""Converts a module in a process of its own, so that a crash of a converter or an engine ends only that."""

import atexit
import contextlib
import multiprocessing
import os
import shutil
import signal
import stat
import sys
import textwrap
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor, nn

from modalkit.pipelines.cpu_threads import cpu_threads
from modalkit.pipelines.engines.exported import Converted, convert, on_cpu
from modalkit.pipelines.engines.settings import Candidate
from modalkit.pipelines.engines.torch_engine import changing_dimensions, device_of, example_of
from modalkit.pipelines.errors import EngineError

MAX_SECONDS = 600
LOG_FILE = "log.txt"


class Conversion:
    """A conversion that runs: makes `folder`, once the converted module has been tried for all `candidates`.

    They share an engine. On Linux the process is a fork, which starts at once; with CUDA, and elsewhere, it is a new
    one, which imports torch first.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        module: nn.Module,
        batches: Sequence[Mapping[str, Tensor]],
        folder: Path,
    ) -> None:
        self.engine = candidates[0].engine
        self.folder = folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        for abandoned in folder.parent.glob(f"{folder.name}.*"):
            if time.time() - abandoned.stat().st_mtime > MAX_SECONDS:
                shutil.rmtree(abandoned, ignore_errors=True)
        self._partial = folder.with_name(f"{folder.name}.{uuid4().hex}")
        self._partial.mkdir()  # readable for other users, as `tempfile.mkdtemp` makes none
        device = device_of(module)
        uses_cuda: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch has no type for it
        can_fork = sys.platform == "linux" and device.type == "cpu" and not uses_cuda
        context = multiprocessing.get_context("fork") if can_fork else multiprocessing.get_context("spawn")
        example = {name: tensor.cpu() for name, tensor in example_of(batches).items()}
        arguments = (
            tuple(candidates),
            on_cpu(module),
            example,
            changing_dimensions(batches),
            device,
            self._partial,
            folder,
        )
        self._process = context.Process(target=_convert_and_try, args=arguments, daemon=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads: the child computes on one
            self._process.start()
        atexit.register(self._process.kill)  # multiprocessing sends SIGTERM, for which one that pauses does not end

    def wait(self, seconds: float | None) -> None:
        """Wait until the conversion has ended, or for so many seconds; after these it pauses until `go_on`."""
        self._process.join(None if seconds is None else max(seconds, 0))
        if not self.has_ended:
            self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let a conversion that was waited for in vain go on in the background, with the lowest priority."""
        if not self.has_ended:
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, self._process.pid or 0, 19)
            self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._process.pid is not None:
            with contextlib.suppress(ProcessLookupError):  # it has ended, and another thread has looked
                os.kill(self._process.pid, number)

    def require_success(self) -> None:
        """Wait for the end. Raises `EngineError` for a conversion that failed."""
        self._process.join()
        if (why := self.error) is not None:
            raise EngineError(why)

    @property
    def has_ended(self) -> bool:
        """Whether `error` is final."""
        return self._process.exitcode is not None

    @property
    def error(self) -> str | None:
        """Why an ended conversion failed; None for success."""
        code = self._process.exitcode
        if code == 0 or self.folder.is_dir():
            return None
        if code is not None and code < 0:
            return f"the process that tried it was ended by {signal.Signals(-code).name}"
        with contextlib.suppress(OSError, IndexError):
            text = (self._partial / LOG_FILE).read_text(encoding="utf-8", errors="replace")
            return textwrap.shorten(text.strip().splitlines()[-1], 300, placeholder=" ...")
        return f"the process that tried it ended with code {code}"


def _leave_the_service() -> None:
    """In a fork: leave its signals, which an event loop gets by a socket, and its connections and ports alone."""
    signal.set_wakeup_fd(-1)
    for kind in (signal.SIGALRM, signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, signal.SIG_DFL)
    with contextlib.suppress(FileNotFoundError):  # elsewhere than on Linux it is no fork
        for number in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
            with contextlib.suppress(OSError):  # the folder's own is closed by now
                if number > 2 and stat.S_ISSOCK(os.fstat(number).st_mode):
                    os.close(number)


def _convert_and_try(
    candidates: Sequence[Candidate],
    module: nn.Module,
    example: Mapping[str, Tensor],
    changing: Mapping[str, list[int]],
    device: torch.device,
    partial: Path,
    folder: Path,
) -> None:
    """What the process runs: it ends with code 0 once every candidate has computed the example."""
    _leave_the_service()
    signal.alarm(MAX_SECONDS)  # a process that hangs ends itself, even if its parent has ended
    log = os.open(partial / LOG_FILE, os.O_WRONLY | os.O_CREAT, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    cpu_threads().set_total(1)  # the threads of OpenMP are not there after a fork
    try:
        if "transformers" in sys.modules:
            from modalkit.pipelines.engines.encoder import skip_other_tokens

            skip_other_tokens(module, example)
        convert(candidates[0].engine, module, example, changing, partial)
        for candidate in candidates:
            Converted(candidate, partial, device)(example)
        with contextlib.suppress(OSError):  # another process has made it meanwhile
            partial.rename(folder)
    except BaseException as error:  # noqa: BLE001  # the parent reads the last line
        os.write(2, f"\n{type(error).__name__}: {' '.join(str(error).split())}\n".encode())
        os._exit(1)
    os._exit(0)  # nothing that the parent would do at its end
