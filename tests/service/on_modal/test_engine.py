"""Modal as an engine: its calls, errors and dictionaries as Modal's own client gives them, over a socket."""

import builtins
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import modal
import pytest
from grpclib import Status
from modal_proto import api_pb2

from modalkit.batching import Priority
from modalkit.service.calls.engine import CallOptions, CallResult, CallState
from modalkit.service.errors import (
    ContainerFaultError,
    DeviceFaultError,
    NotAvailableError,
    RemoteCallError,
    RemoteTimeoutError,
    ServiceError,
)
from modalkit.service.jobs import Job, JobStatus, JobStoreError
from modalkit.service.on_modal.config import ModalConfig
from modalkit.service.on_modal.container import only_service_errors
from modalkit.service.on_modal.engine import ModalEngine, ModalKeyValueStore, open_records
from modalkit.service.settings import Settings
from tests.support.modal_server import ModalServer, call_graph, ended, raised, returned

pytestmark = pytest.mark.anyio

Result = api_pb2.GenericResult
CALL = "fc-01J"
JOB = Job(
    job_id=f"{CALL}.0",
    model_name="lengths",
    message_json='{"text":"four"}',
    success_queue="ok",
    failure_queue=None,
    meta_json="{}",
    priority=Priority.BULK,
    created_at=1.5,
)


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


def engine(function: Function) -> ModalEngine:
    async def connect() -> Function:
        return function

    return ModalEngine({"m": connect})


async def test_a_call_that_runs_is_pending(modal_server: ModalServer) -> None:
    modal_server.outputs[CALL] = None
    assert await ModalEngine({}).result(CALL, 0.0) == CallResult(CallState.PENDING)
    assert await ModalEngine({}).result(CALL, 0.01) == CallResult(CallState.PENDING)


async def test_a_call_is_waited_for_until_it_returns(modal_server: ModalServer) -> None:
    results: list[CallResult] = []

    async def wait() -> None:
        results.append(await ModalEngine({}).result(CALL, 60.0))

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
        task_group.start_soon(ModalEngine({}).result, CALL, 60.0)
        while not modal_server.requests["FunctionGetOutputs"]:
            await anyio.lowlevel.checkpoint()
        task_group.cancel_scope.cancel()
    modal_server.finish(CALL, returned([]))
    assert await ModalEngine({}).result(CALL, 60.0) == CallResult(CallState.RETURNED, [])


async def test_a_call_that_returned_has_its_outcomes_as_often_as_it_is_asked(modal_server: ModalServer) -> None:
    modal_server.outputs[CALL] = returned([{"status": "success"}])
    for _ in range(2):
        assert await ModalEngine({}).result(CALL, 1.0) == CallResult(CallState.RETURNED, [{"status": "success"}])


async def test_a_call_whose_result_expired_is_told_from_one_that_never_was(modal_server: ModalServer) -> None:
    modal_server.outputs[CALL] = ModalServer.EXPIRED
    forgotten = await ModalEngine({}).result(CALL, 0.0)
    assert (forgotten.state, forgotten.error) == (CallState.FORGOTTEN, "its result was kept for seven days")
    assert await ModalEngine({}).result("fc-other", 0.0) == CallResult(CallState.UNKNOWN)


async def test_an_id_that_modal_refuses_is_unknown(modal_server: ModalServer) -> None:
    modal_server.refusals["FunctionGetOutputs"] = Status.INVALID_ARGUMENT
    assert await ModalEngine({}).result(CALL, 0.0) == CallResult(CallState.UNKNOWN)


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
    """Whatever leaves a container is a `ServiceError`, and so none of the errors of Modal's client."""
    with pytest.raises(ServiceError) as left, only_service_errors("process_request failed"):
        raise error
    modal_server.outputs[CALL] = raised(left.value)
    result = await ModalEngine({}).result(CALL, 0.0)
    assert result.state is CallState.FAILED
    assert str(error) in str(result.error)


async def test_a_container_that_cannot_import_the_app_fails_its_calls(modal_server: ModalServer) -> None:
    """Of what fails before a hook of ours runs, Modal tells in the same way."""
    modal_server.outputs[CALL] = raised(ModuleNotFoundError("No module named 'emphasis'"))
    result = await ModalEngine({}).result(CALL, 0.0)
    assert (result.state, result.error) == (CallState.FAILED, "ModuleNotFoundError: No module named 'emphasis'")


async def test_an_id_that_is_none_of_modals_is_unknown_without_a_question() -> None:
    for call_id in ("in-01J", "FC-01J", "019a5f5e-7c3d-7000-8000-000000000000", "call-1"):
        assert await ModalEngine({}).result(call_id, 0.0) == CallResult(CallState.UNKNOWN)


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
    modal_server.graphs[CALL] = call_graph(CALL, status)
    result = await ModalEngine({}).result(CALL, 0.0)
    assert result.state is state
    assert "so it was" in str(result.error)


@pytest.mark.parametrize("parent", [None, Result.GENERIC_STATUS_SUCCESS])
async def test_a_cancelled_call_is_told_from_a_failed_one_made_here_or_in_a_container(
    modal_server: ModalServer, parent: Any
) -> None:
    """Of both Modal raises the same; made in a container, the call is not at the top of its graph."""
    modal_server.outputs[CALL] = ended(Result.GENERIC_STATUS_TERMINATED, "it is gone")
    modal_server.graphs[CALL] = call_graph(CALL, Result.GENERIC_STATUS_TERMINATED, parent=parent)
    assert (await ModalEngine({}).result(CALL, 0.0)).state is CallState.CANCELLED


async def test_a_call_is_not_cancelled_because_who_made_it_was(modal_server: ModalServer) -> None:
    modal_server.outputs[CALL] = ended(Result.GENERIC_STATUS_FAILURE, "it failed")
    modal_server.graphs[CALL] = call_graph(CALL, Result.GENERIC_STATUS_FAILURE, parent=Result.GENERIC_STATUS_TERMINATED)
    assert (await ModalEngine({}).result(CALL, 0.0)).state is CallState.FAILED


async def test_a_call_of_which_the_graph_is_not_known_has_failed(modal_server: ModalServer) -> None:
    modal_server.outputs[CALL] = ended(Result.GENERIC_STATUS_TERMINATED, "it is gone")
    assert (await ModalEngine({}).result(CALL, 0.0)).state is CallState.FAILED
    modal_server.refusals["FunctionGetCallGraph"] = Status.RESOURCE_EXHAUSTED
    assert (await ModalEngine({}).result(CALL, 0.0)).state is CallState.FAILED


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
        await ModalEngine({}).result(CALL, 0.0)
    with pytest.raises(RemoteCallError, match=r"Modal could not cancel the call: .*refused by the test"):
        await ModalEngine({}).cancel(CALL)


async def test_a_call_is_cancelled_and_its_container_goes_on(modal_server: ModalServer) -> None:
    await ModalEngine({}).cancel(CALL)
    assert modal_server.cancelled == [CALL]


async def test_without_a_token_nothing_is_known_of_a_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    for name in ("MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MODAL_CONFIG_PATH", str(tmp_path / "none.toml"))
    with pytest.raises(RemoteCallError, match="Modal could not be asked: AuthError: Token missing"):
        await ModalEngine({}).result(CALL, 0.0)


async def test_a_list_is_sent_with_its_options_and_answered() -> None:
    function = Function([{"status": "success"}])
    entries = [{"message": 1}]
    async with engine(function) as opened:
        assert await opened.call("m", entries, CallOptions(priority="bulk")) == [{"status": "success"}]
    assert function.asked == [(entries, {"priority": "bulk"})]


async def test_a_spawned_list_gives_the_id_of_its_call() -> None:
    function = Function(Call())
    async with engine(function) as opened:
        assert await opened.enqueue("m", [{"message": 1}], CallOptions(accepted_at=1.0)) == CALL
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
    async with engine(Function(error)) as opened:
        with pytest.raises(RemoteCallError, match=f"the call to Modal failed: {type(error).__name__}: no") as raised_:
            await opened.call("m", [], CallOptions())
        assert not isinstance(raised_.value, RemoteTimeoutError)
        with pytest.raises(RemoteCallError, match=f"Modal did not accept the call: {type(error).__name__}: no"):
            await opened.enqueue("m", [], CallOptions())


async def test_a_call_that_took_too_long_is_told_apart_with_its_limit() -> None:
    async with engine(Function(modal.exception.FunctionTimeoutError("5 s"))) as opened:
        with pytest.raises(RemoteTimeoutError, match=r"longer than deployment_config\.timeout"):
            await opened.call("m", [], CallOptions())


async def test_a_broken_container_says_so_itself() -> None:
    async with engine(Function(DeviceFaultError("CUDA error"))) as opened:
        with pytest.raises(ContainerFaultError, match="the device of this container is broken"):
            await opened.call("m", [], CallOptions())


async def test_without_a_class_to_call_jobs_are_not_available() -> None:
    async with ModalEngine({}) as opened:
        with pytest.raises(NotAvailableError, match="give it job_service"):
            await opened.enqueue("m", [], CallOptions())


async def test_modals_store_says_that_it_cannot_be_reached(modal_server: ModalServer) -> None:
    store = ModalKeyValueStore("jobs")
    await store.put("a", 1)
    for request in ("DictGet", "DictUpdate", "DictPop"):
        modal_server.refusals[request] = Status.RESOURCE_EXHAUSTED
    for use in (lambda: store.get("a"), lambda: store.put("a", 2), lambda: store.remove("a")):
        with pytest.raises(JobStoreError, match=r"modal.Dict of jobs could not be reached: ResourceExhaustedError"):
            await use()


async def test_modals_store_is_asked_again_while_it_is_out_of_reach(
    modal_server: ModalServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Or the call of a container would fail for it, and with it all of its jobs."""
    monkeypatch.setattr("modalkit.service.on_modal.engine.STORE_RETRY_S", 0.0)
    store = ModalKeyValueStore("jobs")
    await store.put("a", 1)
    modal_server.refusals["DictGet"] = Status.UNAVAILABLE
    found: list[int] = []

    async def get() -> None:
        found.append(await store.get("a"))

    async with anyio.create_task_group() as task_group:
        task_group.start_soon(get)
        while not caplog.records:  # Modal's client has given up
            await anyio.sleep(0.001)
        del modal_server.refusals["DictGet"]
    assert found == [1]
    assert "could not be reached: ServiceError" in caplog.text


async def test_modals_store_is_not_asked_for_ever(modal_server: ModalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modalkit.service.on_modal.engine.STORE_RETRIES_S", 0.0)
    modal_server.refusals["DictGet"] = Status.UNAVAILABLE
    with pytest.raises(JobStoreError, match="could not be reached: ServiceError"):
        await ModalKeyValueStore("jobs").get("a")


async def test_without_a_token_the_store_is_made_and_says_so_when_it_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MODAL_CONFIG_PATH", str(tmp_path / "none.toml"))
    records = open_records(ModalConfig(Settings(), environ={}))
    with pytest.raises(JobStoreError, match="Token missing"):
        await records.jobs(CALL)


async def test_the_containers_of_an_app_share_their_records(modal_server: ModalServer) -> None:
    settings = Settings(app_settings={"app_prefix": "mine"})
    await open_records(ModalConfig(settings, environ={})).record(CALL, [JOB])
    (found,) = await open_records(ModalConfig(settings, environ={})).jobs(CALL) or []
    assert found.status is JobStatus.QUEUED
    assert await open_records(ModalConfig(settings, environ={"MODALKIT_APP_POSTFIX": "-live"})).jobs(CALL) is None
