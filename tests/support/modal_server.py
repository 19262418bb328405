"""A server that Modal's own client talks to, over a socket: an `InProcessEngine` in the words of Modal's protocol.

So what is tested of the client is real: which errors it raises, what it retries, how values are written.
"""

import abc
import inspect
import pickle
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import modal
import pytest
from google.protobuf.empty_pb2 import Empty  # type: ignore[import-untyped]  # it has no types
from grpclib import GRPCError, Status
from grpclib.server import Server
from modal._runtime.execution_context import _set_current_context_ids
from modal_proto import api_grpc, api_pb2

from modalkit.service.calls.engine import CallOptions, CallState
from modalkit.service.calls.in_process import InProcessCall, InProcessEngine, Run
from modalkit.service.calls.processor import Call
from modalkit.service.errors import ServiceError
from modalkit.service.on_modal.service import ModalService

Result = api_pb2.GenericResult


class ModalServer:
    """Answers the requests for which it has a method; what it does not know is unimplemented.

    Calls and dictionaries are those of an `engine`, with its faults. Beside them, `outputs` has results of calls by
    their id, None for one that runs and `EXPIRED` for one that was forgotten, and `graphs` what is known of their
    inputs. A method in `refusals` fails with that status, as long as it is there.
    """

    EXPIRED = object()

    def __init__(self, engine: InProcessEngine) -> None:
        self.engine = engine
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

    async def DictGet(self, request: Any) -> Any:  # noqa: N802
        value = await self.engine.store.get(_key(request.dict_id, request.key))
        return api_pb2.DictGetResponse(found=value is not None, value=pickle.dumps(value))

    async def DictUpdate(self, request: Any) -> Any:  # noqa: N802
        (entry,) = request.updates
        value = pickle.loads(entry.value)  # noqa: S301  # of this process, here and below
        key = _key(request.dict_id, entry.key)
        is_new = await self.engine.store.put(key, value, skip_if_exists=request.if_not_exists)
        return api_pb2.DictUpdateResponse(created=is_new)

    async def DictPop(self, request: Any) -> Any:  # noqa: N802
        key = _key(request.dict_id, request.key)
        value = await self.engine.store.get(key)
        await self.engine.store.remove(key)
        return api_pb2.DictPopResponse(found=value is not None, value=pickle.dumps(value))

    async def DictContents(self, request: Any) -> AsyncIterator[Any]:  # noqa: N802
        for key, value in (await self.engine.store.items()).items():
            dict_id, _, name = key.partition(" ")
            if dict_id == request.dict_id:
                yield api_pb2.DictEntry(key=pickle.dumps(name), value=pickle.dumps(value))

    async def FunctionMap(self, request: Any) -> Any:  # noqa: N802
        (item,) = request.pipelined_inputs
        (entries,), options = pickle.loads(item.input.args)  # noqa: S301
        call_id = _modal_id(await self.engine.enqueue("lengths", entries, CallOptions(**options)))
        put = api_pb2.FunctionPutInputsResponseItem(idx=0, input_id=f"in-{call_id}", input_jwt=call_id)
        return api_pb2.FunctionMapResponse(function_call_id=call_id, function_call_jwt=call_id, pipelined_inputs=[put])

    async def FunctionGetOutputs(self, request: Any) -> Any:  # noqa: N802
        call = self.engine.calls.get(_engine_id(request.function_call_id))
        if call is not None:
            await self.engine.result(_engine_id(request.function_call_id), request.timeout)
            output = _output(call)
        elif request.function_call_id not in self.outputs:
            raise GRPCError(Status.NOT_FOUND, "there is no such call")
        else:
            if self.outputs[request.function_call_id] is None:
                with anyio.move_on_after(request.timeout):
                    await self.finished.wait()
            output = self.outputs[request.function_call_id]
        if output is None or output is self.EXPIRED:
            return api_pb2.FunctionGetOutputsResponse(num_unfinished_inputs=int(output is None))
        item = api_pb2.FunctionGetOutputsItem(result=output, idx=0, data_format=api_pb2.DATA_FORMAT_PICKLE)
        return api_pb2.FunctionGetOutputsResponse(outputs=[item], idxs=[0])

    def FunctionGetCallGraph(self, request: Any) -> Any:  # noqa: N802
        call = self.engine.calls.get(_engine_id(request.function_call_id))
        if call is not None and call.result.state is CallState.CANCELLED:
            return call_graph(request.function_call_id, Result.GENERIC_STATUS_TERMINATED)
        return self.graphs.get(request.function_call_id, api_pb2.FunctionGetCallGraphResponse())

    async def FunctionCallCancel(self, request: Any) -> Any:  # noqa: N802
        self.cancelled.append(request.function_call_id)
        if _engine_id(request.function_call_id) in self.engine.calls:
            await self.engine.cancel(_engine_id(request.function_call_id))
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


def call_graph(call_id: str, status: Any, *, parent: Any = None) -> Any:
    """What Modal knows of the input of a call, alone or made by another input."""
    made = api_pb2.FunctionGetCallGraphResponse()
    made.inputs.add(input_id="in-1", function_call_id=call_id, status=status)
    made.function_calls.add(function_call_id=call_id, parent_input_id="" if parent is None else "in-0")
    if parent is not None:
        made.inputs.add(input_id="in-0", function_call_id="fc-00J", status=parent)
        made.function_calls.add(function_call_id="fc-00J")
    return made


def as_modal_runs_it(service: ModalService) -> Run:
    """Runs the calls of an engine by ``process_request`` of a service that runs, as Modal's runtime does."""

    async def run(entries: Sequence[Any], call: Call) -> Any:
        process: Any = service.process_request  # to its types a Function, which it is only once registered
        call_id = _modal_id(call.call_id)
        leave = _set_current_context_ids([f"in-{call_id}"], [call_id], ["attempt"])
        try:
            return await process(entries, **call.options.arguments())
        finally:
            leave()

    return run


def _output(call: InProcessCall) -> Any:
    match call.result.state:
        case CallState.PENDING:
            return None
        case CallState.RETURNED:
            return returned(call.result.outcomes)
        case CallState.FAILED:
            if call.error is None:
                return ended(Result.GENERIC_STATUS_FAILURE, str(call.result.error))
            return raised(call.error)
        case CallState.FORGOTTEN:
            return ModalServer.EXPIRED
        case CallState.TIMED_OUT:
            return ended(Result.GENERIC_STATUS_TIMEOUT, str(call.result.error))
    return ended(Result.GENERIC_STATUS_TERMINATED, str(call.result.error))


def _modal_id(call_id: str) -> str:
    return f"fc-{call_id.removeprefix('call-')}"


def _engine_id(call_id: str) -> str:
    return f"call-{call_id.removeprefix('fc-')}"


def _key(dict_id: str, key: bytes) -> str:
    return f"{dict_id} {pickle.loads(key)}"  # noqa: S301


@asynccontextmanager
async def serve_modal(
    folder: Path, monkeypatch: pytest.MonkeyPatch, engine: InProcessEngine
) -> AsyncIterator[ModalServer]:
    """A server in this event loop, and the environment in which Modal's client finds it."""
    known, socket = ModalServer(engine), folder / "modal.sock"
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
            try:
                answer = getattr(known, name)(request)
                if isinstance(answer, AsyncIterator):
                    async for part in answer:
                        await stream.send_message(part)
                    return
                answer = await answer if inspect.isawaitable(answer) else answer
            except ServiceError as error:  # a fault of the engine
                raise GRPCError(Status.RESOURCE_EXHAUSTED, str(error)) from error
            await stream.send_message(answer)

        return handle

    names = api_grpc.ModalClientBase.__abstractmethods__
    return abc.ABCMeta("Servicer", (api_grpc.ModalClientBase,), {name: handler(name) for name in names})()


def _metadata(function: Any) -> Any:
    method = api_pb2.FunctionHandleMetadata(
        function_name=function.function_name,
        use_method_name="process_request",
        is_method=True,
        function_type=api_pb2.Function.FUNCTION_TYPE_FUNCTION,
        max_object_size_bytes=2**20,
    )
    return api_pb2.FunctionHandleMetadata(
        function_name=function.function_name, method_handle_metadata={"process_request": method}
    )


def _data(function: Any) -> Any:
    return api_pb2.FunctionData(
        function_name=function.function_name,
        ranked_functions=[api_pb2.FunctionData.RankedFunction(rank=0, function=function)],
    )
