"""The settings of a server under test, which its process reads from a variable."""

import json
import os
from dataclasses import asdict, dataclass
from typing import Self

VARIABLE = "PEER_SETTINGS"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a server batches and computes. A server that lacks one of these ignores it."""

    batch: int = 1
    """Most requests in a batch."""
    wait_ms: int = 0
    """Milliseconds that a batch may wait for more requests; of BentoML, its ``max_latency_ms``."""
    workers: int = 1
    """Processes that run the model."""
    threads: int | None = None
    """Threads of torch in each of them; None leaves the number to the server and to torch."""
    option: str = ""
    """What else distinguishes two ways to run a server."""
    engine: str = "torch"
    dtype: str = "float32"
    port: int = 0

    def to_variable(self) -> dict[str, str]:
        """The variable to start a server with."""
        return {VARIABLE: json.dumps(asdict(self))}

    @classmethod
    def from_variable(cls) -> Self:
        """The settings that this process was started with."""
        return cls.from_text(os.environ[VARIABLE])

    @classmethod
    def from_text(cls, text: str) -> Self:
        """The settings in a value of the variable."""
        return cls(**json.loads(text))

    def __str__(self) -> str:
        threads = "" if self.threads is None else f" of {self.threads} thread{'s' * (self.threads > 1)}"
        parts = [
            f"batches of {self.batch}" if self.batch > 1 else "no batching",
            f"wait {self.wait_ms} ms" if self.batch > 1 else "",
            f"{self.workers} worker{'s' * (self.workers > 1)}{threads}",
            self.option,
        ]
        return ", ".join(filter(None, parts))
