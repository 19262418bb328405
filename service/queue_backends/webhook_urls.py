"""Which URLs and IP addresses webhooks may go to, and a network that connects to no others."""

import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from weakref import WeakValueDictionary

import anyio
import anyio.to_thread
import httpcore
import httpx

from modalkit.service.queue_backends.protocol import QueueBackendError, QueueNameError

MAX_LOOK_UPS = 64  # at a time, each in a thread

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""From a host's name and a port to the host's addresses, preferred ones first."""

# What `is_global` says differs between releases of Python, so networks that are not always excluded are written out,
# after IANA's registries of special-purpose addresses (2025).
_NOT_PUBLIC = [
    ipaddress.ip_network(network)
    for network in (
        "168.63.129.16/32",  # Azure's own services, inside of each of its networks
        "192.0.0.0/24",
        "192.88.99.0/24",
        "224.0.0.0/4",
        "2001::/23",  # Teredo and other protocols
        "2001:db8::/32",
        "2002::/16",  # 6to4, which wraps any IPv4 address
        "3fff::/20",
    )
]
_PUBLIC_IPV6 = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_DEFAULT_PORTS = {"https": 443, "http": 80}
_HOST_NAME = re.compile(r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*")
# Texts that systems read as an IPv4 address, but that are not in standard notation: 0x7f.1, 2130706433, 127.1.
_ODD_ADDRESS = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)")


def parse_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address if `host` is one in standard notation, else None."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address is public; an IPv6 address with an IPv4 address inside is judged by that one."""
    if isinstance(address, ipaddress.IPv6Address):
        in_nat64 = ipaddress.IPv4Address(address.packed[-4:]) if address in _NAT64 else None
        address = address.ipv4_mapped or in_nat64 or address
    is_global = address.is_global if isinstance(address, ipaddress.IPv4Address) else address in _PUBLIC_IPV6
    return is_global and not any(address in network for network in _NOT_PUBLIC)


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


class _LookUp:
    """A look-up that is made once for all connections that wait for it; a cancelled one is made by the next."""

    def __init__(self) -> None:
        self.lock = anyio.Lock()
        self.answer: Sequence[str] | OSError | None = None


class CheckedNetwork(httpcore.AsyncNetworkBackend):
    """Connects to a host by an address that was checked, so that a second look-up of the name cannot change it.

    A name is refused if any of its addresses is not public. TLS still checks the certificate against the name.
    Concurrent connections to one name share a look-up: `resolve`, or the operating system's. For one event loop.
    """

    def __init__(self, resolve: Resolve | None, *, allow_private_addresses: bool) -> None:
        self._resolve = resolve or self._ask_system
        # Threads of their own, so that look-ups that hang do not block other work.
        self._threads = anyio.CapacityLimiter(MAX_LOOK_UPS)
        self._allow_private_addresses = allow_private_addresses
        self._network = httpcore.AnyIOBackend()
        self._look_ups = WeakValueDictionary[tuple[str, int], _LookUp]()  # the running ones

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109  # the signature of httpcore's
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to the first address of `host` that answers. Raises `QueueBackendError`, `httpcore.ConnectError`."""
        addresses = await self._checked_addresses(host, port)
        # So that one dead address leaves time for the next.
        share_s = None if timeout is None else timeout / len(addresses)
        for address in addresses[:-1]:
            with suppress(httpcore.ConnectError, httpcore.ConnectTimeout):
                return await self._network.connect_tcp(address, port, share_s, local_address, socket_options)
        return await self._network.connect_tcp(addresses[-1], port, timeout, local_address, socket_options)

    async def _checked_addresses(self, host: str, port: int) -> Sequence[str]:
        addresses = [host] if parse_address(host) else await self._look_up(host, port)
        if isinstance(addresses, OSError):
            raise QueueBackendError(f"the address of {host} cannot be found: {addresses}") from addresses
        if not addresses:
            raise QueueBackendError(f"{host} has no address")
        for text in addresses:
            if not self._allow_private_addresses and not is_public(ipaddress.ip_address(text)):
                raise QueueBackendError(
                    f"{host} has the address {text}, which is not public; set allow_private_addresses if results may "
                    "go there"
                )
        return addresses

    async def _look_up(self, host: str, port: int) -> Sequence[str] | OSError:
        look_up = self._look_ups.setdefault((host, port), _LookUp())
        async with look_up.lock:
            if look_up.answer is None:
                try:
                    look_up.answer = await self._resolve(host, port)
                except OSError as error:
                    look_up.answer = error.with_traceback(None)  # whose frames would keep the look-up
        return look_up.answer

    async def _ask_system(self, host: str, port: int) -> Sequence[str]:
        # As bytes: text would be encoded by Python's IDNA, which refuses names that the system may know.
        ask = partial(socket.getaddrinfo, host.encode("ascii"), port, type=socket.SOCK_STREAM)
        found = await anyio.to_thread.run_sync(ask, abandon_on_cancel=True, limiter=self._threads)
        return list(dict.fromkeys(str(address[0]) for *_, address in found))
