"""A server that Modal's own client talks to, over a socket: it keeps dictionaries, and says of calls what it is told.

So what is tested of the client is real: which errors it raises, what it retries, how values are written.
"""

import abc
import inspect
import pickle
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import modal
import pytest
from google.protobuf.empty_pb2 import Empty  # type: ignore[import-untyped]  # it has no types
from grpclib import GRPCError, Status
from grpclib.server import Server
from modal_proto import api_grpc, api_pb2

Result = api_pb2.GenericResult


class ModalServer:
    """Answers the requests for which it has a method; what it does not know is unimplemented.

    `outputs` has the results of calls by their id, None for one that runs and `EXPIRED` for one that was forgotten.
    `graphs` has what is known of their inputs. A method in `refusals` fails with that status, as long as it is there.
    """

    EXPIRED = object()

    def __init__(self) -> None:
        self.tables: defaultdict[str, dict[bytes, bytes]] = defaultdict(dict)
        self.outputs: dict[str, Any] = {}
        self.graphs: dict[str, api_pb2.FunctionGetCallGraphResponse] = {}
        self.functions: dict[str, api_pb2.Function] = {}
        self.refusals: dict[str, Status] = {}
        self.cancelled: list[str] = []
        self.finished = anyio.Event()
        self.requests: Counter[str] = Counter()

    def ClientHello(self, request: Any) -> Any:  # noqa: N802  # as Modal names it, here and below
        return api_pb2.ClientHelloResponse(image_builder_version="2025.06")

    def DictGetOrCreate(self, request: Any) -> Any:  # noqa: N802
        return api_pb2.DictGetOrCreateResponse(dict_id=f"di-{request.deployment_name}")

    def DictGet(self, request: Any) -> Any:  # noqa: N802
        table = self.tables[request.dict_id]
        return api_pb2.DictGetResponse(found=request.key in table, value=table.get(request.key))

    def DictUpdate(self, request: Any) -> Any:  # noqa: N802
        table = self.tables[request.dict_id]
        (entry,) = request.updates
        if request.if_not_exists and entry.key in table:
            return api_pb2.DictUpdateResponse(created=False)
        table[entry.key] = entry.value
        return api_pb2.DictUpdateResponse(created=True)

    def DictPop(self, request: Any) -> Any:  # noqa: N802
        table = self.tables[request.dict_id]
        return api_pb2.DictPopResponse(found=request.key in table, value=table.pop(request.key, None))

    async def FunctionGetOutputs(self, request: Any) -> Any:  # noqa: N802
        if request.function_call_id not in self.outputs:
            raise GRPCError(Status.NOT_FOUND, "there is no such call")
        if self.outputs[request.function_call_id] is None:
            with anyio.move_on_after(request.timeout):
                await self.finished.wait()
        output = self.outputs[request.function_call_id]
        if output is None or output is self.EXPIRED:
            return api_pb2.FunctionGetOutputsResponse(num_unfinished_inputs=int(output is None))
        item = api_pb2.FunctionGetOutputsItem(result=output, idx=0, data_format=api_pb2.DATA_FORMAT_PICKLE)
        return api_pb2.FunctionGetOutputsResponse(outputs=[item], idxs=[0])

    def FunctionGetCallGraph(self, request: Any) -> Any:  # noqa: N802
        return self.graphs.get(request.function_call_id, api_pb2.FunctionGetCallGraphResponse())

    def FunctionCallCancel(self, request: Any) -> Any:  # noqa: N802
        self.cancelled.append(request.function_call_id)
        return Empty()

    def ClassGet(self, request: Any) -> Any:  # noqa: N802
        if f"{request.object_tag}.*" not in self.functions:
            raise GRPCError(Status.NOT_FOUND, f"there is no class {request.object_tag}")
        return api_pb2.ClassGetResponse(class_id="cs-1", handle_metadata=api_pb2.ClassHandleMetadata())

    def FunctionGet(self, request: Any) -> Any:  # noqa: N802
        function = self.functions[request.object_tag]
        return api_pb2.FunctionGetResponse(
            function_id="fu-1", handle_metadata=_metadata(function), function=_data(function)
        )

    def FunctionBindParams(self, request: Any) -> Any:  # noqa: N802
        (function,) = self.functions.values()
        bound = api_pb2.Function()
        bound.CopyFrom(function)
        bound.max_concurrent_inputs = request.function_options.max_concurrent_inputs
        return api_pb2.FunctionBindParamsResponse(bound_function_id="fu-2", handle_metadata=_metadata(bound))

    def finish(self, call_id: str, output: Any) -> None:
        """Let a call that runs have its result; who waits for it gets it."""
        self.outputs[call_id] = output
        self.finished.set()

    def deploy_class(self, name: str, *, max_concurrent_inputs: int = 0) -> None:
        """Let a class be looked up that has a method ``process_request``."""
        self.functions[f"{name}.*"] = api_pb2.Function(
            function_name=f"{name}.*", is_class=True, max_concurrent_inputs=max_concurrent_inputs
        )


def returned(value: Any) -> Any:
    """A result."""
    return Result(status=Result.GENERIC_STATUS_SUCCESS, data=pickle.dumps(value))


def raised(error: BaseException) -> Any:
    """What became of a call that raised in its container."""
    return Result(status=Result.GENERIC_STATUS_FAILURE, data=pickle.dumps(error), exception=repr(error))


def ended(status: Any, message: str) -> Any:
    """What became of a call that Modal ended."""
    return Result(status=status, exception=message)


@asynccontextmanager
async def serve_modal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ModalServer]:
    """A server in this event loop, and the environment in which Modal's client finds it."""
    known, socket = ModalServer(), folder / "modal.sock"
    monkeypatch.setenv("MODAL_SERVER_URL", f"unix://{socket}")
    monkeypatch.setenv("MODAL_TOKEN_ID", "ak-test")
    monkeypatch.setenv("MODAL_TOKEN_SECRET", "as-test")
    server = Server([_servicer(known)])
    await server.start(path=str(socket))
    try:
        yield known
    finally:
        client = await modal.Client.from_env.aio()
        await client.close.aio()  # the next test has another server
        server.close()
        await server.wait_closed()


def _servicer(known: ModalServer) -> Any:
    def handler(name: str) -> Any:
        async def handle(_: Any, stream: Any) -> None:
            request = await stream.recv_message()
            known.requests[name] += 1
            if name in known.refusals:
                raise GRPCError(known.refusals[name], "refused by the test")
            if not hasattr(known, name):
                raise GRPCError(Status.UNIMPLEMENTED, f"the test's server has no {name}")
            answer = getattr(known, name)(request)
            await stream.send_message(await answer if inspect.isawaitable(answer) else answer)

        return handle

    names = api_grpc.ModalClientBase.__abstractmethods__
    return abc.ABCMeta("Servicer", (api_grpc.ModalClientBase,), {name: handler(name) for name in names})()


def _metadata(function: Any) -> Any:
    method = api_pb2.FunctionHandleMetadata(
        function_name=function.function_name,
        use_method_name="process_request",
        is_method=True,
        function_type=api_pb2.Function.FUNCTION_TYPE_FUNCTION,
    )
    return api_pb2.FunctionHandleMetadata(
        function_name=function.function_name, method_handle_metadata={"process_request": method}
    )


def _data(function: Any) -> Any:
    return api_pb2.FunctionData(
        function_name=function.function_name,
        ranked_functions=[api_pb2.FunctionData.RankedFunction(rank=0, function=function)],
    )
