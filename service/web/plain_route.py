"""A route that FastAPI documents and does not get in the way of."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute


class PlainRoute(APIRoute):
    """Calls its endpoint with the request, and nothing else: no parameters are read, no dependencies are run.

    What FastAPI does for each request costs as much as all that is done for a job.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See FastAPI's "Custom Request and APIRoute class"."""
        endpoint = self.endpoint

        async def handle(request: Request) -> Response:
            response: Response = await endpoint(request)
            return response

        return handle
