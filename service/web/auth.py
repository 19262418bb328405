"""Authentication by API keys, of which only hashes are kept; what each key may be used for, and how much."""

import hashlib
import hmac
import ipaddress
import logging
import math
import socket
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any

import anyio
from fastapi import Depends, Request
from fastapi.security import APIKeyHeader, HTTPBearer
from pydantic import SecretStr
from starlette.types import Scope

from modalkit.batching.task_groups import plain_task_group
from modalkit.service.jobs import Job
from modalkit.service.loading import LoadError
from modalkit.service.settings import AuthConfig, KeyConfig, KeyScope
from modalkit.service.web.problems import ProblemError
from modalkit.service.web.ssm_key import SsmKey, key_digest

AUTH = "app_settings.auth_config"
BURST_S = 1.0
"""Seconds of a rate that may be used at once."""
MAX_ADDRESSES = 10_000
"""Client addresses whose wrong keys are counted."""
WRONG_KEY_DELAY_S = 1.0
"""Seconds after which a wrong key is answered, if its address has sent too many of them."""
_CALLER = "modalkit_caller"

logger = logging.getLogger(__name__)


class Rate:
    """A limit of what a key may ask for per second; None is no limit. `clock` gives seconds, from any start.

    One request may take more than is left, so that a list of any length is accepted; the next ones wait longer.
    """

    def __init__(self, per_second: float | None, clock: Callable[[], float]) -> None:
        self._seconds_each = 0.0 if per_second is None else 1 / per_second
        self._clock = clock
        self._used_until = -math.inf

    def delay_s(self) -> float:
        """Seconds after which more may be taken; 0 for now."""
        return max(0.0, self._used_until - BURST_S - self._clock()) if self._seconds_each else 0.0

    def take(self, count: int) -> None:
        """Count what is done."""
        if self._seconds_each:
            self._used_until = max(self._used_until, self._clock()) + count * self._seconds_each


class WrongKeys:
    """How many wrong keys each client address sends in a minute; `per_minute` of them are allowed, None is no limit.

    Where there are very many addresses, some are counted together. Of IPv6, a network of 64 bits is one address.
    """

    def __init__(self, per_minute: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = math.inf if per_minute is None else per_minute
        self._clock = clock
        self._counts = Counter[str]()
        self._until_s = -math.inf

    def add(self, address: str) -> float:
        """Count a wrong key; returns the seconds for which the address may send no more, 0 if it may."""
        with suppress(ValueError):  # for what is no address of IPv6
            mapped = ipaddress.IPv6Address(address).ipv4_mapped
            address = str(mapped or ipaddress.IPv6Network((address, 64), strict=False))
        now = self._clock()
        if now >= self._until_s:
            self._counts.clear()
            self._until_s = now + 60.0
        if address not in self._counts and len(self._counts) >= MAX_ADDRESSES:
            address = "other addresses"
        self._counts[address] += 1
        excess = self._counts[address] - self._per_minute
        if excess == 1:
            logger.warning("More than %d wrong API keys came from %s within a minute", self._per_minute, address)
        return self._until_s - now if excess > 0 else 0.0


class Caller:
    """A key as requests use it. `owner` is its name, which its jobs have; empty for the only key, and without keys."""

    def __init__(self, owner: str, config: KeyConfig | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.owner = owner
        self._scopes = frozenset(KeyScope if config is None else config.scopes)
        self.sees_all_jobs = KeyScope.ADMIN in self._scopes
        self.visible_owner = None if self.sees_all_jobs else owner
        """The owner of the jobs that the key sees; None for all."""
        self._requests = Rate(None if config is None else config.max_requests_per_second, clock)
        self._items = Rate(None if config is None else config.max_items_per_second, clock)
        self._max_in_flight = math.inf if config is None else config.max_requests_in_flight or math.inf
        self._in_flight = 0

    def require(self, scope: KeyScope) -> None:
        """Raise `ProblemError` unless the key may be used for this."""
        if scope not in self._scopes and not self.sees_all_jobs:
            raise ProblemError(
                HTTPStatus.FORBIDDEN,
                f"this API key lacks the scope {scope}; add it to {AUTH}.keys.{self.owner}.scopes, or use another",
            )

    def sees(self, job: Job) -> bool:
        """Whether the job belongs to this key, or the key may see those of all."""
        return self.sees_all_jobs or job.owner == self.owner

    def enter(self) -> None:
        """Count a request that begins; `leave` has to follow. Raises `ProblemError` for one that exceeds a limit."""
        if self._in_flight >= self._max_in_flight:
            raise _over_limit(f"{self._max_in_flight} requests in flight", 1.0)
        _check_rate(self._requests, "requests per second")
        self._requests.take(1)
        self._in_flight += 1

    def leave(self) -> None:
        """Count a request of `enter` that has ended."""
        self._in_flight -= 1

    def take_items(self, count: int) -> None:
        """Count items or jobs that are submitted; 0 only checks. Raises `ProblemError` where they come too fast."""
        _check_rate(self._items, "items per second")
        self._items.take(count)

    async def wait_for_items(self, count: int) -> None:
        """Wait until more items may be submitted, and count these: for streams, which are read no faster."""
        if delay_s := self._items.delay_s():
            await anyio.sleep(delay_s)
        self._items.take(count)


def _check_rate(rate: Rate, what: str) -> None:
    if delay_s := rate.delay_s():
        raise _over_limit(what, delay_s)


def _over_limit(what: str, delay_s: float) -> ProblemError:
    return _too_many(f"this API key has reached its limit of {what}", delay_s)


def _too_many(why: str, delay_s: float) -> ProblemError:
    headers = {"Retry-After": str(math.ceil(delay_s))}
    return ProblemError(HTTPStatus.TOO_MANY_REQUESTS, f"{why}; retry later", headers=headers)


ANYONE = Caller("", None)
"""The caller of a service without keys."""


def caller_of(request: Request) -> Caller:
    """The caller that `ApiKeys.check` found."""
    caller: Caller = request.scope.get("state", {}).get(_CALLER, ANYONE)
    return caller


def end_request(scope: Scope) -> None:
    """Count a request as ended, if it was checked."""
    caller: Caller | None = scope.get("state", {}).pop(_CALLER, None)
    if caller is not None:
        caller.leave()


def scheme_of(header: str) -> str:
    """What comes before a key in this header: `Bearer` and a space, or nothing in a header of another name."""
    return "Bearer " if header.lower() == "authorization" else ""


class ApiKeys:
    """The keys that requests may carry in the header `header`; without any, all requests are let in.

    A key costs one hash and one look into a dictionary. Only digests are compared, so the time of a comparison tells
    nothing about a key. `opened` is the context in which requests are checked: it keeps keys in AWS SSM up to date, and
    raises `LoadError`.
    """

    def __init__(
        self,
        header: str,
        callers: Mapping[bytes, Caller],
        in_ssm: Iterable[tuple[SsmKey, Caller]] = (),
        max_wrong_per_minute: int | None = None,
    ) -> None:
        self.header = header
        self._is_bearer = bool(scheme_of(header))
        self._callers = callers
        self._in_ssm = tuple(in_ssm)
        self._wrong = WrongKeys(max_wrong_per_minute)
        self.are_asked_for = bool(self._callers or self._in_ssm)

    @asynccontextmanager
    async def opened(self) -> AsyncGenerator[None]:
        """Keep the keys in AWS SSM up to date while the context is open. Raises `LoadError`."""
        async with AsyncExitStack() as opened:
            for ssm_key, _ in self._in_ssm:
                await opened.enter_async_context(ssm_key.opened())
            yield

    def requires(self, scope: KeyScope) -> list[Any]:
        """Dependencies of a FastAPI route, or of a router, that only keys with this scope may use."""
        if not self.are_asked_for:
            return []

        async def check(request: Request) -> None:
            await self.check(request, scope)

        return [*self.documented(), Depends(check)]

    def documented(self) -> list[Any]:
        """A dependency that only documents the header."""
        if not self.are_asked_for:
            return []
        return [
            Depends(
                HTTPBearer(auto_error=False) if self._is_bearer else APIKeyHeader(name=self.header, auto_error=False)
            )
        ]

    async def check(self, request: Request, scope: KeyScope) -> Caller:
        """The caller of a request, which `DirectRoutes` counts until it ends.

        Raises `ProblemError` for a request without a key, or with one that may not be used for this, or not now. It
        does not wait where the key is right.
        """
        if not self.are_asked_for:
            return ANYONE
        caller = await self._find(request)
        caller.require(scope)
        caller.enter()
        request.scope.setdefault("state", {})[_CALLER] = caller
        return caller

    async def _find(self, request: Request) -> Caller:
        key = request.headers.get(self.header, "")
        if self._is_bearer:
            kind, _, key = key.partition(" ")
            key = key.strip(" \t") if kind.lower() == "bearer" else ""
        if key:
            digest = hashlib.sha256(key.encode("latin-1")).digest()  # Starlette decodes headers as Latin-1
            caller = self._callers.get(digest) or self._find_in_ssm(digest)
            if caller is None and self._in_ssm:
                async with plain_task_group() as task_group:
                    for ssm_key, _ in self._in_ssm:
                        task_group.start_soon(ssm_key.refresh)
                caller = self._find_in_ssm(digest)
            if caller is not None:
                return caller
            if delay_s := self._wrong.add(request.client.host if request.client else ""):
                await anyio.sleep(WRONG_KEY_DELAY_S)
                raise _too_many("this address has sent too many wrong API keys", delay_s)
        problem = "the API key is wrong" if key else "the API key is missing"
        form = "Authorization: Bearer <key>" if self._is_bearer else f"{self.header}: <key>"
        detail = f"{problem}: send it as the header '{form}'"
        raise ProblemError(HTTPStatus.UNAUTHORIZED, detail, headers={"WWW-Authenticate": "Bearer"})

    def _find_in_ssm(self, digest: bytes) -> Caller | None:
        for ssm_key, caller in self._in_ssm:
            if ssm_key.digest is not None and hmac.compare_digest(ssm_key.digest, digest):
                return caller
        return None


def configured_keys(config: AuthConfig) -> ApiKeys:
    """The configured keys.

    Raises `LoadError` for a name without a key, for a key that no header can carry or that two names have, for a file
    that cannot be read, and where aiobotocore or the region for AWS SSM is missing.
    """
    keys = dict(config.keys)
    if config.api_key is not None or config.ssm_key is not None:
        keys[""] = KeyConfig(api_key=config.api_key, ssm_key=config.ssm_key, scopes=[KeyScope.ADMIN])
    callers: dict[bytes, Caller] = {}
    in_ssm = list[tuple[SsmKey, Caller]]()
    for name, key in keys.items():
        section, caller = f"{AUTH}.keys.{name}" if name else AUTH, Caller(name, key)
        if key.ssm_key is not None:
            setting, region, refresh_s = f"{section}.ssm_key", config.ssm_region, config.ssm_refresh_seconds
            in_ssm.append((SsmKey(key.ssm_key, setting=setting, region=region, refresh_s=refresh_s), caller))
            continue
        if key.file is None and key.api_key is None:
            variable = f"MODALKIT_APP_SETTINGS__AUTH_CONFIG__KEYS__{name}__API_KEY"
            raise LoadError(f"{section}: has no key: give it in one of api_key (or {variable}), file and ssm_key")
        setting = f"{section}.{'api_key' if key.file is None else 'file'}"
        try:
            digest = key_digest(Path(key.file).read_text("utf-8") if key.file else _text_of(key.api_key))
        except OSError as error:
            raise LoadError(f"{setting}: {key.file} cannot be read: {error.strerror}; correct the path") from None
        except ValueError as error:
            raise LoadError(f"{setting}: {error}") from None
        if digest in callers:
            raise LoadError(f"{setting}: another name has the same key; give each name a key of its own")
        callers[digest] = caller
    return ApiKeys(config.auth_header, callers, in_ssm, config.max_wrong_keys_per_minute)


def _text_of(secret: SecretStr | None) -> str:
    return "" if secret is None else secret.get_secret_value()


def refuse_strangers(config: AuthConfig, listener: socket.socket) -> None:
    """Raise `LoadError` where other machines can reach the socket, no key is asked for, and nothing allows that."""
    if config.asks_for_key or config.insecure or listener.family not in (socket.AF_INET, socket.AF_INET6):
        return
    host = listener.getsockname()[0]
    if not ipaddress.ip_address(host).is_loopback:
        raise LoadError(
            f"without an API key nothing is served on {host}: all who reach this address could use the models, and "
            f"read and cancel all jobs. Set {AUTH}.api_key (or MODALKIT_APP_SETTINGS__AUTH_CONFIG__API_KEY), or listen "
            f"on 127.0.0.1; where something else keeps strangers away, give --insecure (or {AUTH}.insecure: true)"
        )
