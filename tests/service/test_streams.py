"""Pipelines that yield their results piece by piece: a batch streams together, and each caller gets its own pieces."""

import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from pydantic import BaseModel

from modalkit.batching import DeadlineExceededError, OutputCountError, Success
from modalkit.pipelines import AsyncInputModel, InferenceOutputModel, InferencePipeline, RejectItem
from modalkit.service.errors import InvalidItemError
from modalkit.service.jobs import Job, JobStatus, MemoryJobStore
from modalkit.service.jobs.manager import JobManager
from modalkit.service.settings import Settings
from modalkit.service.streams import MAX_UNREAD_PIECES, NoPieceError
from modalkit.service.worker import InferenceWorker
from tests.support.length_model import Length, LengthPipeline, Text
from tests.support.panic import Panic

pytestmark = pytest.mark.anyio


class Piece(InferenceOutputModel):
    text: str


class Spelling(InferencePipeline):
    """Spells texts: in each step one more letter of each. Waits before each step while `gate` is cleared.

    The letter ``!`` raises `error`, ``?`` rejects its item in its place.
    """

    input_model = Text
    error: BaseException = ConnectionError("the model broke")

    def __init__(self) -> None:
        super().__init__("spelling", ".", {})
        self.batches: list[list[str]] = []
        self.steps = 0
        self.closed = 0
        self.gate = threading.Event()
        self.gate.set()

    def pieces(self, texts: Sequence[str], length: int) -> list[Any]:
        self.steps += 1
        if any(text[length - 1 : length] == "!" for text in texts):
            raise self.error
        return [
            None
            if length > len(text)
            else RejectItem("no questions")
            if text[length - 1] == "?"
            else Piece(text=text[:length])
            for text in texts
        ]

    def start(self, input_list: list[BaseModel]) -> list[str]:
        texts = [item.text for item in input_list if isinstance(item, Text)]
        self.batches.append(texts)
        return texts

    def predict_stream(self, input_list: list[BaseModel]) -> Iterator[Sequence[InferenceOutputModel | None]]:
        texts = self.start(input_list)
        try:
            for length in range(1, max(map(len, texts)) + 1):
                self.gate.wait(60)
                yield self.pieces(texts, length)
        finally:
            self.closed += 1


class SpellingElsewhere(Spelling):
    """The same, asynchronously."""

    async def predict_stream(  # type: ignore[override]  # its base is a generator for the tests of those
        self, input_list: list[BaseModel]
    ) -> AsyncIterator[Sequence[InferenceOutputModel | None]]:
        texts = self.start(input_list)
        try:
            for length in range(1, max(map(len, texts)) + 1):
                await checkpoint()
                while not self.gate.is_set():
                    await checkpoint()
                yield self.pieces(texts, length)
        finally:
            self.closed += 1


Kind = Callable[[], Spelling]
BOTH = pytest.mark.parametrize("kind", [Spelling, SpellingElsewhere])


async def spelled(worker: InferenceWorker, text: str) -> list[str]:
    """The pieces that a caller gets; the last is the text of the error that ended them, if any."""
    pieces = list[str]()
    try:
        async for piece in worker.predict_stream({"text": text}):
            assert isinstance(piece, Piece)
            pieces.append(piece.text)
    except Exception as error:  # noqa: BLE001  # that is what is looked at
        pieces.append(f"{type(error).__name__}: {error}")
    return pieces


async def all_spelled(worker: InferenceWorker, texts: Sequence[str]) -> dict[str, list[str]]:
    """What callers at the same time get."""
    found: dict[str, list[str]] = {}

    async def call(text: str) -> None:
        found[text] = await spelled(worker, text)

    async with anyio.create_task_group() as task_group:
        for text in texts:
            task_group.start_soon(call, text)
    return found


@BOTH
async def test_each_caller_gets_the_pieces_of_its_own_item(kind: Kind) -> None:
    pipeline = kind()
    async with InferenceWorker(pipeline) as worker:
        assert await all_spelled(worker, ["abc", "de", "f"]) == {
            "abc": ["a", "ab", "abc"],
            "de": ["d", "de"],
            "f": ["f"],
        }
    assert pipeline.closed == len(pipeline.batches)


def pausing(kind: Kind) -> Spelling:
    """A pipeline that waits after the first step of each batch."""
    pipeline = kind()
    make = pipeline.pieces

    def pieces_and_pause(texts: Sequence[str], length: int) -> list[Any]:
        if length == 1:
            pipeline.gate.clear()
        return make(texts, length)

    pipeline.pieces = pieces_and_pause  # type: ignore[method-assign]  # in place of one more class for each kind
    return pipeline


@BOTH
async def test_the_first_piece_comes_before_the_second_is_made(kind: Kind) -> None:
    pipeline = pausing(kind)
    async with InferenceWorker(pipeline) as worker:
        async with aclosing(worker.predict_stream(Text(text="ab"))) as pieces:
            assert await anext(pieces) == Piece(text="a")
            assert pipeline.steps == 1
            pipeline.gate.set()
            assert await anext(pieces) == Piece(text="ab")
            with pytest.raises(StopAsyncIteration):
                await anext(pieces)


@BOTH
async def test_callers_who_do_not_stream_and_jobs_get_the_last_piece(kind: Kind) -> None:
    async with InferenceWorker(kind()) as worker:
        assert await worker.predict(Text(text="abc")) == Piece(text="abc")
        assert await worker.predict_many([{"text": "abc"}, {"text": "d"}]) == [
            Success(Piece(text="abc")),
            Success(Piece(text="d")),
        ]
        job_id = await worker.submit(AsyncInputModel(message={"text": "abc"}))
        job = await worker.job(job_id, wait_s=60)
    assert job is not None
    assert (job.status, (job.result or {})["text"]) == (JobStatus.SUCCEEDED, "abc")


@BOTH
async def test_an_error_in_an_items_place_ends_that_item_alone(kind: Kind) -> None:
    async with InferenceWorker(kind()) as worker:
        found = await all_spelled(worker, ["ab?de", "abcde"])
    assert found == {"ab?de": ["a", "ab", "RejectItem: no questions"], "abcde": ["a", "ab", "abc", "abcd", "abcde"]}


@BOTH
@pytest.mark.parametrize("error", [ConnectionError("broke"), Panic("broke")])
async def test_after_an_error_in_mid_stream_no_piece_comes_twice(kind: Kind, error: BaseException) -> None:
    """Those who got a piece get the error, the others their results."""
    pipeline = kind()
    pipeline.error = error
    found: dict[str, list[str]] = {}
    predicted: list[InferenceOutputModel] = []

    async def stream(text: str) -> None:
        found[text] = await spelled(worker, text)

    async def predict() -> None:
        predicted.append(await worker.predict(Text(text="abcdef")))

    async with InferenceWorker(pipeline) as worker, anyio.create_task_group() as task_group:
        task_group.start_soon(stream, "abc!")
        task_group.start_soon(stream, "abcdef")
        task_group.start_soon(predict)
    assert sorted(pipeline.batches[0]) == ["abc!", "abcdef", "abcdef"]
    for pieces in found.values():
        assert pieces[:-1] == ["a", "ab", "abc"]
        assert f"{type(error).__name__}: broke" in pieces[-1]
    assert predicted == [Piece(text="abcdef")]


@BOTH
async def test_when_no_caller_waits_any_more_the_generator_is_closed(kind: Kind) -> None:
    pipeline = pausing(kind)
    async with InferenceWorker(pipeline) as worker:
        async with aclosing(worker.predict_stream(Text(text="abcdef"))) as pieces:
            assert await anext(pieces) == Piece(text="a")
        pipeline.gate.set()
        assert await worker.predict(Text(text="g")) == Piece(text="g")
    assert pipeline.batches == [["abcdef"], ["g"]]
    assert pipeline.closed == 2
    assert 2 <= pipeline.steps <= 3, "one of each batch, and one that may have been under way when its caller left"


@BOTH
async def test_a_cancelled_caller_does_not_disturb_the_others(kind: Kind) -> None:
    pipeline = kind()
    async with InferenceWorker(pipeline) as worker, anyio.create_task_group() as task_group:
        found: list[list[str]] = []

        async def other() -> None:
            found.append(await spelled(worker, "abcdef"))

        async def cancelled() -> None:
            with anyio.CancelScope() as scope:
                async with aclosing(worker.predict_stream(Text(text="z" * 1000))) as pieces:
                    async for _ in pieces:
                        scope.cancel()

        task_group.start_soon(other)
        task_group.start_soon(cancelled)
    assert found == [["a", "ab", "abc", "abcd", "abcde", "abcdef"]]


@BOTH
async def test_a_stream_that_is_late_raises_and_its_batch_ends(kind: Kind) -> None:
    pipeline = kind()
    pipeline.gate.clear()
    async with InferenceWorker(pipeline) as worker:
        with pytest.raises(DeadlineExceededError, match=r"no result within 0\.05 s"):
            async for _ in worker.predict_stream(Text(text="abc"), timeout_s=0.05):
                pass
        pipeline.gate.set()
        assert await worker.predict(Text(text="b")) == Piece(text="b")


@BOTH
@pytest.mark.parametrize("texts", [["ab"], ["ab", "cd"]])
async def test_a_stream_cut_by_the_batch_timeout_is_not_started_again(kind: Kind, texts: list[str]) -> None:
    pipeline = pausing(kind)
    settings = Settings(app_settings={"batch_config": {"batch_timeout_seconds": 0.1}})
    async with InferenceWorker(pipeline, settings=settings) as worker:
        found = await all_spelled(worker, texts)
        pipeline.gate.set()
        assert await spelled(worker, "e") == ["e"]
    first, second = pipeline.batches
    assert (sorted(first), second) == (texts, ["e"])
    for text, (piece, error) in found.items():
        assert piece == text[:1]
        assert error.startswith(
            "BatchTimeoutError" if len(texts) == 1 else "StreamCutError: the batch took longer than"
        )


@BOTH
async def test_those_who_watch_jobs_get_their_pieces_and_change_nothing(kind: Kind) -> None:
    """A job of which a piece was told runs again after an error of its batch, as all jobs do."""
    pipeline = kind()
    pipeline.gate.clear()
    async with JobManager(MemoryJobStore()) as jobs, InferenceWorker(pipeline, jobs=jobs) as worker:
        requests = [AsyncInputModel(message={"text": text}) for text in ("ab!", "abcdef")]
        bad, good = [outcome.value for outcome in await worker.submit_many(requests) if isinstance(outcome, Success)]
        ends: dict[str, JobStatus] = {}
        pieces: dict[str, list[str]] = {bad: [], good: []}
        async for change in jobs.watch([bad, good]):
            pipeline.gate.set()
            if isinstance(change, Job):
                ends[change.job_id] = change.status
            elif isinstance(change.output, Piece):
                pieces[change.job_id].append(change.output.text)
    assert sorted(pipeline.batches[0]) == ["ab!", "abcdef"]
    assert ends == {bad: JobStatus.FAILED, good: JobStatus.SUCCEEDED}
    assert pieces[good][-1] == "abcdef"
    assert set(pieces[bad]) <= {"a", "ab"}
    assert not jobs._watches  # noqa: SLF001  # nothing is left behind


async def test_a_caller_that_is_slow_misses_pieces_but_not_the_result() -> None:
    async with InferenceWorker(Spelling()) as worker:
        async with aclosing(worker.predict_pieces({"text": "x" * 500})) as outputs:
            await anext(outputs)
            assert await worker.predict({"text": "after"}) == Piece(text="after")  # the first batch has ended
            left = [output async for output in outputs]
    assert len(left) <= MAX_UNREAD_PIECES
    assert left[-1] == Success(Piece(text="x" * 500))


async def test_a_pipeline_that_does_not_stream_has_one_piece() -> None:
    async with InferenceWorker(LengthPipeline(), calibrate=False) as worker:
        assert [piece async for piece in worker.predict_stream({"text": "four"})] == [Length(length=4)]
        with pytest.raises(InvalidItemError):
            await anext(worker.predict_stream({"text": ""}))


@pytest.mark.parametrize(
    ("steps", "error"), [([], NoPieceError), ([[None]], NoPieceError), ([[Piece(text="a")] * 2], OutputCountError)]
)
async def test_steps_without_pieces_or_with_too_many_are_errors(steps: list[Any], error: type[Exception]) -> None:
    class Odd(InferencePipeline):
        def predict_stream(self, input_list: list[BaseModel]) -> list[Any]:
            return steps

    async with InferenceWorker(Odd("odd", ".", {}), calibrate=False) as worker:
        with pytest.raises(error):
            await worker.predict({"text": "a"})


@BOTH
async def test_run_inference_gives_the_last_pieces(kind: Kind) -> None:
    items: list[BaseModel] = [Text(text="abc"), Text(text="d")]
    outputs = kind().run_inference(items)
    assert (outputs if isinstance(outputs, list) else await outputs) == [Piece(text="abc"), Piece(text="d")]


class Sorting(Spelling):
    """Sorts the list that it is given, as a generator does that pads little, and answers in that order."""

    def start(self, input_list: list[BaseModel]) -> list[str]:
        input_list.sort(key=lambda item: len(str(item)))
        return super().start(input_list)


class SortingElsewhere(Sorting, SpellingElsewhere):
    """The same, asynchronously."""


@pytest.mark.parametrize("kind", [Sorting, SortingElsewhere])
async def test_no_caller_gets_the_pieces_of_another_where_the_pipeline_changes_the_order_of_its_list(
    kind: Kind,
) -> None:
    async with InferenceWorker(kind()) as worker:
        texts = ["abc", "de", "f"]
        outcomes = await worker.predict_many([{"text": text} for text in texts])
        assert outcomes == [Success(Piece(text=text)) for text in texts]
        assert (await all_spelled(worker, texts))["abc"] == ["a", "ab", "abc"]
