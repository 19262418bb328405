"""Modal's errors in our words: those of calls as Modal's own client raises them, over a socket."""

import builtins
from typing import Any

import anyio.lowlevel
import modal
import pytest
from grpclib import Status
from modal_proto import api_pb2

from modalkit.service.errors import ContainerFaultError, DeviceFaultError, RemoteCallError, RemoteTimeoutError
from modalkit.service.on_modal.remote import CallResult, CallState, ModalCalls, ModalRemoteService
from tests.support.modal_server import ModalServer, ended, raised, returned

pytestmark = pytest.mark.anyio

Result = api_pb2.GenericResult
CALL = "fc-01J"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"  # Modal's client runs on asyncio alone


class Function:
    """What a client has of ``process_request``, raising one of Modal's errors or returning."""

    def __init__(self, outcome: Any) -> None:
        self.remote = self.spawn = self
        self.outcome = outcome
        self.asked: list[tuple[Any, dict[str, Any]]] = []

    async def aio(self, input_list: Any, **options: Any) -> Any:
        self.asked.append((input_list, options))
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


class Call:
    object_id = CALL


def graph(status: Any, *, parent: Any = None) -> Any:
    """What Modal knows of the call, alone or made by another input."""
    made = api_pb2.FunctionGetCallGraphResponse()
    made.inputs.add(input_id="in-1", function_call_id=CALL, status=status)
    made.function_calls.add(function_call_id=CALL, parent_input_id="" if parent is None else "in-0")
    if parent is not None:
        made.inputs.add(input_id="in-0", function_call_id="fc-00J", status=parent)
        made.function_calls.add(function_call_id="fc-00J")
    return made


async def test_a_call_that_runs_is_pending(modal_server: ModalServer) -> None:
    modal_server.outputs[CALL] = None
    assert await ModalCalls().result(CALL, 0.0) == CallResult(CallState.PENDING)
    assert await ModalCalls().result(CALL, 0.01) == CallResult(CallState.PENDING)


async def test_a_call_is_waited_for_until_it_returns(modal_server: ModalServer) -> None:
    results: list[CallResult] = []

    async def wait() -> None:
        results.append(await ModalCalls().result(CALL, 60.0))

    modal_server.outputs[CALL] = None
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(wait)
        while not modal_server.requests["FunctionGetOutputs"]:
            await anyio.lowlevel.checkpoint()
        modal_server.finish(CALL, returned([]))
    assert results == [CallResult(CallState.RETURNED, [])]


async def test_a_question_whose_caller_goes_away_takes_nothing_from_the_next(modal_server: ModalServer) -> None:
    modal_server.outputs[CALL] = None
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(ModalCalls().result, CALL, 60.0)
        while not modal_server.requests["FunctionGetOutputs"]:
            await anyio.lowlevel.checkpoint()
        task_group.cancel_scope.cancel()
    modal_server.finish(CALL, returned([]))
    assert await ModalCalls().result(CALL, 60.0) == CallResult(CallState.RETURNED, [])


async def test_a_call_that_returned_has_its_outcomes_as_often_as_it_is_asked(modal_server: ModalServer) -> None:
    modal_server.outputs[CALL] = returned([{"status": "success"}])
    for _ in range(2):
        assert await ModalCalls().result(CALL, 1.0) == CallResult(CallState.RETURNED, [{"status": "success"}])


async def test_a_call_whose_result_expired_is_told_from_one_that_never_was(modal_server: ModalServer) -> None:
    modal_server.outputs[CALL] = ModalServer.EXPIRED
    forgotten = await ModalCalls().result(CALL, 0.0)
    assert (forgotten.state, forgotten.error) == (CallState.FORGOTTEN, "its result was kept for seven days")
    assert await ModalCalls().result("fc-other", 0.0) == CallResult(CallState.UNKNOWN)


async def test_an_id_that_modal_refuses_is_unknown(modal_server: ModalServer) -> None:
    modal_server.refusals["FunctionGetOutputs"] = Status.INVALID_ARGUMENT
    assert await ModalCalls().result(CALL, 0.0) == CallResult(CallState.UNKNOWN)


@pytest.mark.parametrize(
    "error",
    [
        *(ValueError("no"), DeviceFaultError("CUDA error"), KeyError("a"), modal.exception.ExecutionError("no")),
        # What Modal's client raises too, of a call that runs, or is not there, or cannot be asked for.
        *(builtins.TimeoutError("no"), builtins.TimeoutError(), modal.exception.ConnectionError("no")),
        *(modal.exception.NotFoundError("no"), modal.exception.OutputExpiredError("no")),
    ],
)
async def test_what_a_call_raised_in_its_container_is_its_failure(modal_server: ModalServer, error: Exception) -> None:
    modal_server.outputs[CALL] = raised(error)
    result = await ModalCalls().result(CALL, 0.0)
    assert result.state is CallState.FAILED
    assert str(error) in str(result.error)


@pytest.mark.parametrize(
    ("status", "state"),
    [
        (Result.GENERIC_STATUS_TIMEOUT, CallState.TIMED_OUT),
        (Result.GENERIC_STATUS_INTERNAL_FAILURE, CallState.FAILED),
        (Result.GENERIC_STATUS_INIT_FAILURE, CallState.FAILED),
        (Result.GENERIC_STATUS_FAILURE, CallState.FAILED),
    ],
)
async def test_a_call_that_modal_ended_says_why(modal_server: ModalServer, status: Any, state: CallState) -> None:
    modal_server.outputs[CALL] = ended(status, "so it was")
    modal_server.graphs[CALL] = graph(status)
    result = await ModalCalls().result(CALL, 0.0)
    assert result.state is state
    assert "so it was" in str(result.error)


@pytest.mark.parametrize("parent", [None, Result.GENERIC_STATUS_SUCCESS])
async def test_a_cancelled_call_is_told_from_a_failed_one_whoever_made_it(
    modal_server: ModalServer, parent: Any
) -> None:
    """Of both Modal raises the same; made in a container, the call is not at the top of its graph."""
    modal_server.outputs[CALL] = ended(Result.GENERIC_STATUS_TERMINATED, "it is gone")
    modal_server.graphs[CALL] = graph(Result.GENERIC_STATUS_TERMINATED, parent=parent)
    assert (await ModalCalls().result(CALL, 0.0)).state is CallState.CANCELLED


async def test_a_call_is_not_cancelled_because_who_made_it_was(modal_server: ModalServer) -> None:
    modal_server.outputs[CALL] = ended(Result.GENERIC_STATUS_FAILURE, "it failed")
    modal_server.graphs[CALL] = graph(Result.GENERIC_STATUS_FAILURE, parent=Result.GENERIC_STATUS_TERMINATED)
    assert (await ModalCalls().result(CALL, 0.0)).state is CallState.FAILED


async def test_a_call_of_which_the_graph_is_not_known_has_failed(modal_server: ModalServer) -> None:
    modal_server.outputs[CALL] = ended(Result.GENERIC_STATUS_TERMINATED, "it is gone")
    assert (await ModalCalls().result(CALL, 0.0)).state is CallState.FAILED
    modal_server.refusals["FunctionGetCallGraph"] = Status.RESOURCE_EXHAUSTED
    assert (await ModalCalls().result(CALL, 0.0)).state is CallState.FAILED


@pytest.mark.parametrize(
    "refusal",
    [
        *(Status.RESOURCE_EXHAUSTED, Status.UNAUTHENTICATED, Status.PERMISSION_DENIED, Status.UNIMPLEMENTED),
        Status.INTERNAL,
    ],
)
async def test_what_modal_does_not_answer_says_nothing_of_the_call(modal_server: ModalServer, refusal: Status) -> None:
    modal_server.outputs[CALL] = returned([])
    modal_server.refusals["FunctionGetOutputs"] = modal_server.refusals["FunctionCallCancel"] = refusal
    with pytest.raises(RemoteCallError, match=r"Modal could not be asked: .*refused by the test"):
        await ModalCalls().result(CALL, 0.0)
    with pytest.raises(RemoteCallError, match=r"Modal could not cancel the call: .*refused by the test"):
        await ModalCalls().cancel(CALL)


async def test_a_call_is_cancelled_and_its_container_goes_on(modal_server: ModalServer) -> None:
    await ModalCalls().cancel(CALL)
    assert modal_server.cancelled == [CALL]


async def test_without_a_token_nothing_is_known_of_a_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    for name in ("MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MODAL_CONFIG_PATH", str(tmp_path / "none.toml"))
    with pytest.raises(RemoteCallError, match="Modal could not be asked: AuthError: Token missing"):
        await ModalCalls().result(CALL, 0.0)


async def test_a_list_is_sent_with_its_options_and_answered() -> None:
    function = Function([{"status": "success"}])
    entries = [{"message": 1}]
    assert await ModalRemoteService(function).process(entries, priority="bulk") == [{"status": "success"}]
    assert function.asked == [(entries, {"priority": "bulk"})]


async def test_a_spawned_list_gives_the_id_of_its_call() -> None:
    function = Function(Call())
    assert await ModalRemoteService(function).spawn([{"message": 1}], accepted_at=1.0) == CALL
    assert function.asked == [([{"message": 1}], {"accepted_at": 1.0})]


@pytest.mark.parametrize(
    "error",
    [
        modal.exception.AuthError("no"),
        modal.exception.ConnectionError("no"),
        modal.exception.ExecutionError("no"),
        modal.exception.InternalFailure("no"),
        modal.exception.NotFoundError("no"),
        modal.exception.RemoteError("no"),
        modal.exception.ResourceExhaustedError("no"),
        modal.exception.ServiceError("no"),
        builtins.TimeoutError("no"),
        ValueError("no"),
    ],
)
async def test_a_call_that_fails_is_a_failed_call(error: Exception) -> None:
    with pytest.raises(RemoteCallError, match=f"the call to Modal failed: {type(error).__name__}: no") as raised_:
        await ModalRemoteService(Function(error)).process([])
    assert not isinstance(raised_.value, RemoteTimeoutError)
    with pytest.raises(RemoteCallError, match=f"Modal did not accept the call: {type(error).__name__}: no"):
        await ModalRemoteService(Function(error)).spawn([])


async def test_a_call_that_took_too_long_is_told_apart_with_its_limit() -> None:
    with pytest.raises(RemoteTimeoutError, match=r"longer than deployment_config\.timeout"):
        await ModalRemoteService(Function(modal.exception.FunctionTimeoutError("5 s"))).process([])


async def test_a_broken_container_says_so_itself() -> None:
    with pytest.raises(ContainerFaultError, match="the device of this container is broken"):
        await ModalRemoteService(Function(DeviceFaultError("CUDA error"))).process([])
