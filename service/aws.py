"""Clients of AWS: the optional library, the region and the retries that all of them share."""

import os
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from modalkit.pipelines.extras import install_command
from modalkit.service.errors import ServiceError


def aws_clients(
    service: str,
    region: str | None,
    *,
    error_class: type[ServiceError],
    needed_by: str,
    extra: str,
    setting: str,
    endpoint_url: str | None = None,
    read_timeout_s: float,
    max_connections: int = 10,
) -> tuple[str, Callable[[], AbstractAsyncContextManager[Any]]]:
    """The region, and a function that opens a client of `service` there. Such clients run on asyncio alone.

    Credentials, and the region where `region` is None, come from where AWS's tools look for them. `needed_by`,
    `extra` (which installs the library) and `setting` (which gives the region) are for the messages of the
    `error_class`, which is raised where the library is not installed or no region is found.
    """
    try:
        # Not at the top: the library is optional. Not at the first request: what is missing shows at the start.
        from aiobotocore.config import AioConfig  # type: ignore[import-untyped]  # ships no types
        from aiobotocore.session import get_session  # type: ignore[import-untyped]  # ships no types
        from botocore.exceptions import BotoCoreError  # type: ignore[import-untyped]  # ships no types
        from botocore.utils import (  # type: ignore[import-untyped]  # ships no types
            is_valid_endpoint_url,
            is_valid_ipv6_endpoint_url,
            validate_region_name,
        )
    except ImportError as error:
        raise error_class(f"{needed_by} needs aiobotocore ({error}): {install_command(extra)}") from error
    session = get_session()
    try:
        # botocore reads AWS_DEFAULT_REGION. AWS_REGION is what AWS's other SDKs and Modal's form for credentials use.
        region_name = region or session.get_config_variable("region") or os.environ.get("AWS_REGION")
        validate_region_name(region_name)  # else the first request would fail
    except BotoCoreError as error:
        raise error_class(
            f"{needed_by}: the region of {service.upper()} cannot be used: {error}; set {setting}"
        ) from error
    if not region_name:
        raise error_class(
            f"{needed_by}: no region of {service.upper()} is configured: set {setting} or the variable AWS_REGION or "
            "AWS_DEFAULT_REGION"
        )
    if endpoint_url is not None and not (
        endpoint_url.startswith(("http://", "https://"))
        and (is_valid_endpoint_url(endpoint_url) or is_valid_ipv6_endpoint_url(endpoint_url))
    ):
        raise error_class(f"{needed_by}: endpoint_url must be a URL, as in http://localhost:4566, not {endpoint_url!r}")
    config = AioConfig(
        connect_timeout=3,
        read_timeout=read_timeout_s,
        max_pool_connections=max_connections,
        # The callers retry. The one repetition here is for a connection that AWS closed while it was idle.
        retries={"mode": "standard", "total_max_attempts": 2},
        warm_up_loader_caches=True,  # reads the description of the service in a thread, not in the event loop
    )
    return region_name, lambda: session.create_client(
        service, region_name=region_name, endpoint_url=endpoint_url, config=config
    )


def aws_answer(error: Exception) -> tuple[str, str]:
    """The code, without its prefix, and the message of an error that AWS itself answered with; else two empty texts."""
    response = getattr(error, "response", None)
    answer = response.get("Error", {}) if isinstance(response, dict) else {}
    return answer.get("Code", "").rpartition(".")[2], answer.get("Message", "")
