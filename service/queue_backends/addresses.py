"""Which IP addresses belong to the public Internet, and a network that connects to no others."""

import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence

import anyio
import anyio.to_thread
import httpcore

from modalkit.service.queue_backends.protocol import QueueBackendError

MAX_LOOK_UPS = 64  # at a time, each in a thread

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""From a host's name and a port to the host's addresses, preferred ones first."""

# What `is_global` says differs between releases of Python, so networks that are not always excluded are written out,
# after IANA's registries of special-purpose addresses (2025).
_NOT_PUBLIC_IPV4 = [
    ipaddress.IPv4Network(network)
    for network in (
        "168.63.129.16/32",  # Azure's own services, inside of each of its networks
        "192.0.0.0/24",
        "192.88.99.0/24",
        "224.0.0.0/4",
    )
]
_PUBLIC_IPV6 = ipaddress.IPv6Network("2000::/3")
_NOT_PUBLIC_IPV6 = [
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # Teredo and other protocols
        "2001:db8::/32",
        "2002::/16",  # 6to4, which wraps any IPv4 address
        "3fff::/20",
    )
]
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def parse_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address if `host` is one in standard notation, else None."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address is public; an IPv6 address with an IPv4 address inside is judged by that one."""
    if isinstance(address, ipaddress.IPv6Address):
        embedded = address.ipv4_mapped
        if address in _NAT64:
            embedded = ipaddress.IPv4Address(address.packed[-4:])
        if embedded is None:
            return address in _PUBLIC_IPV6 and not any(address in network for network in _NOT_PUBLIC_IPV6)
        address = embedded
    return address.is_global and not any(address in network for network in _NOT_PUBLIC_IPV4)


class _LookUp:
    """A running look-up, whose answer several connections may wait for."""

    def __init__(self) -> None:
        self.done = anyio.Event()
        self.answer: Sequence[str] | OSError | None = None  # also None after a cancelled look-up


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
        self._look_ups: dict[tuple[str, int], _LookUp] = {}  # the running ones

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
            try:
                return await self._network.connect_tcp(address, port, share_s, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue
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
        while (look_up := self._look_ups.get((host, port))) is not None:
            await look_up.done.wait()
            if look_up.answer is not None:
                return look_up.answer
        look_up = self._look_ups[host, port] = _LookUp()
        try:
            look_up.answer = await self._resolve(host, port)
        except OSError as error:
            look_up.answer = error
        finally:
            del self._look_ups[host, port]
            look_up.done.set()
        return look_up.answer

    async def _ask_system(self, host: str, port: int) -> Sequence[str]:
        def look_up() -> Sequence[str]:
            # As bytes: text would be encoded by Python's IDNA, which refuses names that the system may know.
            found = socket.getaddrinfo(host.encode("ascii"), port, type=socket.SOCK_STREAM)
            return list(dict.fromkeys(str(address[0]) for *_, address in found))

        return await anyio.to_thread.run_sync(look_up, abandon_on_cancel=True, limiter=self._threads)
