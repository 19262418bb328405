"""Which URLs webhooks may go to, checked by their text alone."""

import re
from collections.abc import Sequence

import httpx

from modalkit.service.queue_backends.addresses import is_public, parse_address
from modalkit.service.queue_backends.protocol import QueueNameError

_DEFAULT_PORTS = {"https": 443, "http": 80}
_HOST_NAME = re.compile(r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*")
# Texts that systems read as an IPv4 address, but that are not in standard notation: 0x7f.1, 2130706433, 127.1.
_ODD_ADDRESS = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)")


def shown_queue_name(queue_name: str) -> str:
    """A queue's name for messages and logs: of a URL only scheme, host and port, because the rest is often secret."""
    if "/" not in queue_name:
        return queue_name
    try:
        url = httpx.URL(queue_name)
    except httpx.InvalidURL:
        return "(a URL)"
    return f"{url.scheme}://{url.netloc.decode()}" if url.scheme and url.host else "(a URL)"


class AllowedURLs:
    """Checks URLs against the allowed hosts, without any look-up of names.

    An entry of `hosts` is a name or an address. It allows only the scheme's default port, unless it has another, as in
    ``hooks.example.com:8443``. ``*.example.com`` allows all names below ``example.com``, at any depth, but not
    ``example.com``. Case is ignored, and ``bücher.example`` is the same as its ASCII form. Plain HTTP and private
    addresses need `allow_private_addresses`. Raises `ValueError` for an entry that is no host.
    """

    def __init__(self, hosts: Sequence[str], *, allow_private_addresses: bool) -> None:
        if isinstance(hosts, str) or not hosts:
            raise ValueError("allowed_hosts must list at least one host, as in ['hooks.example.com']")
        self._allowed = [_allowed_host(number, host) for number, host in enumerate(hosts)]
        self._allow_private_addresses = allow_private_addresses

    def parse(self, queue_name: str) -> httpx.URL:
        """The URL that a queue's name is. Raises `QueueNameError` for one that is not allowed."""
        shown = shown_queue_name(queue_name)
        try:
            url = httpx.URL(queue_name)
            host = _host_of(url)
        except (httpx.InvalidURL, ValueError):
            raise QueueNameError(shown, "is no URL of a host, as in https://hooks.example.com/results") from None
        if url.scheme not in ("https", *(["http"] if self._allow_private_addresses else [])):
            raise QueueNameError(shown, "must be an https URL (http is for allow_private_addresses)")
        if url.userinfo:
            raise QueueNameError(shown, "must hold no user name and no password")
        port = url.port or _DEFAULT_PORTS[url.scheme]
        if not any(
            (host.endswith(pattern[1:]) if pattern.startswith("*.") else host == pattern)
            and port == (listed or _DEFAULT_PORTS[url.scheme])
            for pattern, listed in self._allowed
        ):
            raise QueueNameError(shown, "is not among the allowed hosts and ports (allowed_hosts)")
        address = parse_address(host)
        if address is not None and not self._allow_private_addresses and not is_public(address):
            raise QueueNameError(shown, "is no address of the public Internet (allow_private_addresses is off)")
        return url


def _allowed_host(number: int, text: str) -> tuple[str, int | None]:
    wildcard = "*." if text.startswith("*.") else ""
    host = text.removeprefix(wildcard)
    if parse_address(host) and ":" in host:
        host = f"[{host}]"
    # The text is not shown: if it is a whole URL, its path may be secret.
    error = ValueError(
        f"allowed_hosts[{number}] must be a host, *.domain or host:port, as in hooks.example.com, and no URL"
    )
    try:
        url = httpx.URL(f"https://{host}")
        pattern = wildcard + _host_of(url)
    except (httpx.InvalidURL, ValueError):
        raise error from None
    if url.userinfo or url.raw_path != b"/" or "#" in text:
        raise error
    return pattern, url.port


def _host_of(url: httpx.URL) -> str:
    """The host of a URL in standard form. Raises `ValueError` for a host that no standard allows."""
    host = url.raw_host.decode().lower()
    if address := parse_address(host):
        return str(address)
    if len(host) > 253 or not _HOST_NAME.fullmatch(host) or _ODD_ADDRESS.fullmatch(host):
        raise ValueError("no host")
    return host
