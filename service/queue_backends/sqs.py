"""Results to Amazon SQS, or to another server that speaks its protocol."""

import re
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import anyio

from modalkit.service.aws import aws_answer, aws_clients
from modalkit.service.errors import describe_error
from modalkit.service.queue_backends.protocol import (
    QueueBackendError,
    QueueMessage,
    QueueNameError,
    UndeliverableError,
    safe_id,
)
from modalkit.service.queue_backends.sending import ATTEMPT_S, ConnectedBackend, hold

MAX_BATCH_ENTRIES = 10
MAX_BATCH_BYTES = 1_048_576  # of all messages of a batch together, and so of one message
MAX_CONCURRENT_REQUESTS = 100
REQUEST_S = 13.0  # what a request still has after its wait for a connection: cut off, its messages would come twice

_QUEUE_NAME = re.compile(r"[A-Za-z0-9_-]{1,80}|[A-Za-z0-9_-]{1,75}\.fifo")
_REFUSED_CHARACTER = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
# SQS refuses these two, which JSON allows inside of strings; there, their escapes mean the same.
_ESCAPES = {0xFFFE: "\\ufffe", 0xFFFF: "\\uffff"}

_QUEUE_IS_MISSING = {"NonExistentQueue", "QueueDoesNotExist"}
_MESSAGE_IS_REFUSED = {"InvalidMessageContents", "InvalidParameterValue"}
_BATCH_IS_REFUSED = {"BatchRequestTooLong", *_MESSAGE_IS_REFUSED}


@dataclass(frozen=True, slots=True)
class _Entry:
    """A message in the form that SQS gets, and its position among the given messages."""

    position: int
    fields: dict[str, str]
    size_bytes: int


class SQSBackend(ConnectedBackend):
    """Sends results to the SQS queues of an AWS account. Needs the extra ``sqs``, and asyncio.

    Credentials, and the region where `region` is None, come from where AWS's tools look for them. `endpoint_url` is
    the address of another server that speaks SQS. A queue that does not exist is created if `create_missing_queues`,
    else its messages fail. Messages to a queue whose name ends in ``.fifo`` carry the job's id and the time of its end
    for de-duplication (SQS drops a repetition within five minutes) and `message_group_id` as their group; where that is
    None, each job is its own group: full throughput, no order.

    The first message opens the client, `aclose` closes it, and the next message opens another. In between it belongs
    to one event loop. A call of `send_messages` ends within 25 seconds. Raises `QueueBackendError` if aiobotocore is
    not installed, or no region is found.
    """

    _needs_asyncio = True

    def __init__(
        self,
        *,
        region: str | None = None,
        endpoint_url: str | None = None,
        create_missing_queues: bool = False,
        message_group_id: str | None = None,
    ) -> None:
        if message_group_id is not None and safe_id(message_group_id) != message_group_id:
            raise ValueError(
                f"message_group_id must be 1 to 128 letters, digits, - or _, or None, not {message_group_id!r}"
            )
        _, self._create_client = aws_clients(
            "sqs",
            region,
            error_class=QueueBackendError,
            needed_by="SQSBackend",
            extra="sqs",
            setting="app_settings.queue_config.sqs.region (SQSBackend(region=...) in code)",
            endpoint_url=endpoint_url,
            read_timeout_s=10,
            max_connections=MAX_CONCURRENT_REQUESTS,
        )
        self._create_missing_queues = create_missing_queues
        self._message_group_id = message_group_id
        # As many tokens as connections: the timeout of a request starts when it has one.
        self._sending = anyio.CapacityLimiter(MAX_CONCURRENT_REQUESTS)
        self._queue_urls: dict[str, str] = {}

    def check_queue_name(self, queue_name: str) -> None:
        """Raise `QueueNameError` for a text that cannot name an SQS queue."""
        if not _QUEUE_NAME.fullmatch(queue_name):
            raise QueueNameError(
                queue_name,
                "the name of an SQS queue is 1 to 80 letters, digits, - or _, and may end in .fifo (no URL, no ARN)",
            )

    async def send_messages(self, messages: Sequence[QueueMessage]) -> list[Exception | None]:
        """Send messages in batches, concurrently; returns the outcome of each. Raises `QueueBackendError` on trio."""
        connection = self._connection()
        outcomes: list[Exception | None] = [
            QueueBackendError(f"queue {message.queue_name!r}: no answer of SQS within {ATTEMPT_S:g} s")
            for message in messages
        ]
        entries_by_queue = defaultdict[str, list[_Entry]](list)
        for position, message in enumerate(messages):
            try:
                entries_by_queue[message.queue_name].append(self._entry(position, message))
            except QueueBackendError as error:
                outcomes[position] = error

        async def send(queue_name: str, chunk: list[_Entry]) -> None:
            wait_s = scope.deadline - REQUEST_S - anyio.current_time()
            too_busy = f"queue {queue_name!r}: too many messages wait to be sent to SQS"
            try:
                async with hold(self._sending, wait_s, too_busy):
                    sent = await self._request(await connection.get(), queue_name, chunk)
            except Exception as error:  # noqa: BLE001  # a failed chunk must not affect the others
                code, _ = aws_answer(error)
                if code in _QUEUE_IS_MISSING:
                    self._queue_urls.pop(queue_name, None)
                if len(chunk) > 1 and code in _BATCH_IS_REFUSED:
                    # For one message in it, or because this queue has a smaller limit of size: each goes alone.
                    for entry in chunk:
                        task_group.start_soon(send, queue_name, [entry])
                    return
                sent = [_translated(queue_name, error)] * len(chunk)
            for entry, outcome in zip(chunk, sent, strict=True):
                outcomes[entry.position] = outcome

        with anyio.move_on_after(ATTEMPT_S) as scope:
            async with anyio.create_task_group() as task_group:
                for queue_name, entries in entries_by_queue.items():
                    for chunk in _chunks(entries):
                        task_group.start_soon(send, queue_name, chunk)
        return outcomes

    async def _connect(self, stack: AsyncExitStack) -> Any:
        return await stack.enter_async_context(self._create_client())

    async def _request(self, client: Any, queue_name: str, chunk: list[_Entry]) -> Sequence[Exception | None]:
        queue_url = self._queue_urls.get(queue_name) or await self._find_queue(client, queue_name)
        if len(chunk) == 1:
            await client.send_message(QueueUrl=queue_url, **chunk[0].fields)
            return [None]
        entries = [{"Id": str(number), **entry.fields} for number, entry in enumerate(chunk)]
        answer = await client.send_message_batch(QueueUrl=queue_url, Entries=entries)
        taken = {each["Id"] for each in answer.get("Successful", ())}
        failed = {each["Id"]: _failure(queue_name, each) for each in answer.get("Failed", ())}
        unknown = QueueBackendError(f"queue {queue_name!r}: SQS did not say what became of the message")
        return [None if entry["Id"] in taken else failed.get(entry["Id"], unknown) for entry in entries]

    def _entry(self, position: int, message: QueueMessage) -> _Entry:
        """The form of a message for SQS. Raises `UndeliverableError`."""
        queue_name, body = message.queue_name, message.body.translate(_ESCAPES)
        self.check_queue_name(queue_name)
        if refused := _REFUSED_CHARACTER.search(body):
            raise UndeliverableError(
                f"queue {queue_name!r}: SQS takes no character {refused[0]!r}, and JSON text holds none"
            )
        size_bytes = len(body.encode())
        if not 1 <= size_bytes <= MAX_BATCH_BYTES:
            raise UndeliverableError(
                f"queue {queue_name!r}: a message for SQS has 1 to {MAX_BATCH_BYTES} bytes, this one {size_bytes}"
            )
        fields = {"MessageBody": body}
        if queue_name.endswith(".fifo"):
            # The store keeps the time to the microsecond, and so a repetition after a crash has the same id.
            end = "" if message.ended_at is None else f"-{round(message.ended_at * 1_000_000)}"
            fields["MessageDeduplicationId"] = safe_id(message.job_id + end)
            fields["MessageGroupId"] = self._message_group_id or safe_id(message.job_id)
        return _Entry(position, fields, size_bytes)

    async def _find_queue(self, client: Any, queue_name: str) -> str:
        try:
            answer = await client.get_queue_url(QueueName=queue_name)
        except Exception as error:
            if aws_answer(error)[0] not in _QUEUE_IS_MISSING:
                raise
            if not self._create_missing_queues:
                raise QueueBackendError(
                    f"queue {queue_name!r} does not exist: create it, or set "
                    "app_settings.queue_config.sqs.create_missing_queues"
                ) from error
            attributes = {"FifoQueue": "true"} if queue_name.endswith(".fifo") else {}
            answer = await client.create_queue(QueueName=queue_name, Attributes=attributes)
        self._queue_urls[queue_name] = answer["QueueUrl"]
        return self._queue_urls[queue_name]


def _chunks(entries: list[_Entry]) -> list[list[_Entry]]:
    chunks: list[list[_Entry]] = []
    free_bytes = 0
    for entry in entries:
        if entry.size_bytes > free_bytes or len(chunks[-1]) == MAX_BATCH_ENTRIES:
            chunks.append([])
            free_bytes = MAX_BATCH_BYTES
        chunks[-1].append(entry)
        free_bytes -= entry.size_bytes
    return chunks


def _failure(queue_name: str, failed: dict[str, Any]) -> QueueBackendError:
    code = failed.get("Code", "an error without a code").rpartition(".")[2]
    kind = UndeliverableError if failed.get("SenderFault") and code in _MESSAGE_IS_REFUSED else QueueBackendError
    return kind(f"queue {queue_name!r}: SQS answers {code}: {failed.get('Message', '')}")


def _translated(queue_name: str, error: Exception) -> QueueBackendError:
    if isinstance(error, QueueBackendError):
        return error
    kind = UndeliverableError if aws_answer(error)[0] in _MESSAGE_IS_REFUSED else QueueBackendError
    translated = kind(f"queue {queue_name!r}: {describe_error(error)}")
    translated.__cause__ = error
    return translated
