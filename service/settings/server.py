"""The settings of the HTTP server that ``modalkit serve`` starts."""

from pathlib import Path
from typing import Self

from pydantic import model_validator

from modalkit.service.settings.fields import Count, Duration, RootPath, Secret, TrustedProxy, refusal
from modalkit.service.settings.section import Section


class ServerConfig(Section):
    """How `modalkit serve` listens, and what it demands of connections."""

    unix_socket: Path | None = None
    """Unix socket to listen on, in place of an address and a port."""
    tls_certificate: Path | None = None
    """PEM file with the certificate, and those that lead to its root; null serves plain HTTP."""
    tls_key: Path | None = None
    """PEM file with its key; null: the key is in the file of the certificate."""
    tls_key_password: Secret | None = None
    """Password of the key."""
    root_path: RootPath = ""
    """Path below which a proxy shows the service, as in `/models`; the proxy removes it from requests."""
    trusted_proxies: list[TrustedProxy] = ["127.0.0.1", "::1"]
    """Addresses and networks whose `X-Forwarded-For` and `-Proto` headers are believed; "*" is all of them."""
    access_log: bool | None = None
    """Log a line for each request; null: with the log levels info and debug."""
    grace_seconds: Duration = 30
    """Seconds that open requests may take after the signal to stop."""
    max_connections: Count = 10_000
    """Maximum open connections; further ones are refused (HTTP 503), or by TLS closed."""
    header_timeout_seconds: Duration = 10
    """Seconds within which the headers of a request must be complete, and before them a TLS handshake."""
    body_timeout_seconds: Duration = 30
    """Seconds within which the next part of a body must come: 1 KiB, or the end; of a stream of lines 1 byte."""
    answer_timeout_seconds: Duration = 60
    """Seconds within which a client must take a part of its answer."""
    idle_timeout_seconds: Duration = 75
    """Seconds for which a connection without a request stays open; longer than those of a proxy in front."""

    @model_validator(mode="after")
    def _key_has_certificate(self) -> Self:
        if self.tls_certificate is None:
            for key in ("tls_key", "tls_key_password"):
                if getattr(self, key) is not None:
                    raise refusal("is of no use without tls_certificate: give that file too", key)
        return self
