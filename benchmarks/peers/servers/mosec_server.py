"""mosec, which reads its port from the command line: ``--port``."""

from typing import Any

from mosec import Server, Worker

from modalkit.benchmarks.peers.settings import Settings

TIMEOUT_S = 60


class Sentiments(Worker):
    """The model behind mosec's interface."""

    def __init__(self) -> None:
        super().__init__()
        from modalkit.benchmarks.peers.servers.pipeline import Model

        self._model = Model(Settings.from_variable())

    def forward(self, data: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Run one batch."""
        return self._model(data)


if __name__ == "__main__":
    settings = Settings.from_variable()
    server = Server()
    server.append_worker(
        Sentiments,
        num=settings.workers,
        max_batch_size=settings.batch,
        max_wait_time=settings.wait_ms,
        timeout=TIMEOUT_S,
        route="/predict",
    )
    server.run()
