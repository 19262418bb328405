"""LitServe."""

from typing import Any

import litserve

from modalkit.benchmarks.peers.settings import Settings

TIMEOUT_S = 60


class Sentiments(litserve.LitAPI):
    """The model behind LitServe's interface."""

    def setup(self, device: str) -> None:  # noqa: ARG002  # part of the interface
        """Load the model, once in each worker; the other processes do not import torch."""
        from modalkit.benchmarks.peers.servers.pipeline import Model

        self._model = Model(Settings.from_variable())

    def decode_request(self, request: dict[str, Any]) -> dict[str, Any]:
        """Leave the body to the model."""
        return request

    def batch(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Leave the list as it is."""
        return inputs

    def predict(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Run one batch."""
        return self._model(batch)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Leave the list as it is."""
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        """Leave the answer as it is."""
        return output


if __name__ == "__main__":
    settings = Settings.from_variable()
    server = litserve.LitServer(
        Sentiments(max_batch_size=settings.batch, batch_timeout=settings.wait_ms / 1000),
        accelerator="cpu",
        workers_per_device=settings.workers,
        timeout=TIMEOUT_S,
        fast_queue=settings.option == "fast_queue",
    )
    server.run(host="127.0.0.1", port=settings.port, log_level="warning", generate_client_file=False)
