"""Decides which requests run together and when, from the queue, the predicted costs and the time alone."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Generic

from modalkit.batching.adaptive import (
    MIN_TRIAL_FACTOR,
    Arrivals,
    BulkTimeLimit,
    DrainRate,
    Exploration,
    TokenLimit,
)
from modalkit.batching.cost import CostModel
from modalkit.batching.errors import DeadlineUnreachableError, QueueFullError, QueueSlowError, users_error
from modalkit.batching.forming import BatchFormer
from modalkit.batching.policy import Batch, BatchPolicy, Decision, DispatchReason
from modalkit.batching.queue import RequestQueue, RequestT
from modalkit.batching.request import Priority

# An interactive batch with bulk companions must end within (COMPANIONS_LIMITS + COMPANIONS_LIMITS_PER_SHARE * share of
# interactive requests) * bulk time limit, counted from the arrival of its oldest. The rarer interactive requests are,
# the less throughput it costs to give them few companions. If that time has nearly passed already, companions
# may lengthen the batch by COMPANIONS_FACTOR.
COMPANIONS_LIMITS, COMPANIONS_LIMITS_PER_SHARE = 0.6, 1.5
COMPANIONS_FACTOR = 1.1
MAX_COMPANIONS_SHARE = 0.8  # of `bulk_share` that companions use; the rest is for bulk requests that never can be one
SHARE_SMOOTHING = 1 / 64  # of a batch
INTERACTIVE = Priority.INTERACTIVE  # a local name, because an attribute of an enum is slow to look up
INTERACTIVE_RECENT_S = 2.0  # bulk batches stay short for so long after an interactive request


class BatchPlanner(Generic[RequestT]):
    """Forms batches from a queue, within the limits of a policy, by predicted cost; `BatchFormer` has the details.

    The oldest request of a lane (of several owners: that of the owner whose turn it is) is the anchor of the next batch
    of that lane; this is stricter than `max_age_s` demands. The interactive lane goes first. Bulk requests keep
    `bulk_share` of the running time, and also run as companions in interactive batches where they add almost no time.
    While interactive requests arrive, bulk batches are short, because the next interactive request waits for the batch
    that runs.

    There is a cost model for each device, because devices may differ; a device is named by its index. All of them serve
    the one queue.

    The planner does no I/O and never waits: `now` is an argument, and a decision takes effect at once.
    """

    def __init__(self, policy: BatchPolicy, *cost_models: CostModel, workers: int = 1) -> None:
        self.policy = policy
        self.queue: RequestQueue[RequestT] = RequestQueue(policy.max_queue_items, self._own_s)
        self.devices = [_Device(policy, cost_model, self.queue) for cost_model in cost_models]
        self._drain = DrainRate(workers * len(cost_models))
        self._last_interactive_s = -math.inf
        self._arrivals = {priority: Arrivals() for priority in Priority}
        # While both lanes wait, bulk has a right to `bulk_share` of the running time. This is how many seconds it got
        # less than that (more, if negative). It is reset once the bulk lane is empty, so that it cannot accumulate.
        self._bulk_deficit_s = 0.0
        self._bulk_in_flight = 0
        self._interactive_share = 0.0  # of the sizes in recent batches

    def set_policy(self, policy: BatchPolicy, workers: int = 1) -> None:
        """Form the next batches within other limits; what waits stays, also beyond a smaller `max_queue_items`."""
        self.policy = policy
        self._drain.workers = workers * len(self.devices)
        self.queue.set_max_items(policy.max_queue_items)
        for device in self.devices:
            device.former.policy = policy
            device.bulk_time_limit.set_maximum(policy.max_bulk_batch_s)
        self.queue.refresh()

    def push(self, request: RequestT) -> None:
        """Add a new request; raises `QueueFullError` when there is no room."""
        self.push_all((request,))

    def push_all(self, requests: Sequence[RequestT]) -> None:
        """Add new requests of one priority and owner: all of them, or none and raise `QueueFullError`."""
        self.queue.push_all(requests)
        if requests and requests[-1].priority is INTERACTIVE:
            self._last_interactive_s = requests[-1].arrival_s
        if self.policy.max_wait_s:
            for request in requests:
                self._arrivals[request.priority].add(request.size, request.arrival_s)

    def wait_s(self, priority: Priority) -> float:
        """Predicted seconds that a new request would wait: for what is before it in the queue, not for what runs.

        0 before the first batch has ended. A bulk request also waits for all interactive ones.
        """
        seconds = self.queue.seconds(INTERACTIVE)
        if priority is not INTERACTIVE:
            seconds += self.queue.seconds(Priority.BULK)
        return self._drain.wait_s(seconds)

    def check_room(self, priority: Priority, timeout_s: float | None, owner: str = "") -> None:
        """Raise `QueueFullError` or `DeadlineUnreachableError` if a new request should not be queued now."""
        depth, limit = len(self.queue), self.policy.max_queue_items
        try:
            self.queue.check_room(owner, 1)
        except QueueFullError as error:
            self.add_retry(error)
            raise
        if not depth:
            return  # whatever the predictions say: they can become right only if something runs
        wait_s, max_wait_s = self.wait_s(priority), self.policy.max_queue_s
        if timeout_s is not None and wait_s >= timeout_s:
            raise DeadlineUnreachableError(timeout_s, wait_s)
        if max_wait_s is not None and wait_s >= max_wait_s:
            raise QueueSlowError(depth, limit, wait_s, max_wait_s)

    def add_retry(self, error: QueueFullError) -> None:
        """Add to an error of the queue when there will be room, as predicted."""
        missing = error.depth + error.added - error.limit
        error.retry_after_s = self.wait_s(Priority.BULK) * min(1.0, missing / max(1, error.depth))

    def decide(self, now: float, *, device: int = 0, draining: bool = False) -> Decision[RequestT]:
        """Take the next batch out of the queue, or say when to ask again. Call it only when a worker is free.

        The batch is formed by the costs of `device`. With `draining`, no more requests are expected, so no batch waits
        for them.
        """
        expired = self.queue.pop_expired(now)
        wake_s = math.inf
        for priority in self._lanes_in_order():
            anchor = self.queue.oldest(priority)
            if anchor is None:
                continue
            batch = self._form_batch(anchor, now, self.devices[device])
            if batch.reason is DispatchReason.IDLE:
                reason, batch_wake_s = self._dispatch_or_wait(batch, now, self.devices[device])
                # If requests wait in both lanes, the worker has something to do, so it does not wait.
                if reason is None and not draining and len(self.queue) == self.queue.waiting(priority):
                    wake_s = min(wake_s, batch_wake_s)
                    continue
                batch = replace(batch, reason=reason or DispatchReason.IDLE)
            return Decision(self._take(batch, device), expired=expired)
        return Decision(wake_s=wake_s, expired=expired)

    def end_batch(self, batch: Batch[RequestT], elapsed_s: float, *, succeeded: bool = True) -> None:
        """Account for a batch of `decide` that ran for `elapsed_s` seconds.

        The cost model learns from it only if it `succeeded` as a whole, in one run, with results for half of the
        requests at least.
        """
        is_bulk = batch.priority is Priority.BULK
        self._bulk_in_flight -= is_bulk
        self._interactive_share += SHARE_SMOOTHING * (1 - _bulk_part(batch) - self._interactive_share)
        if batch.contended:
            share = self.policy.bulk_share
            used = 1.0 if is_bulk else min(_bulk_part(batch), MAX_COMPANIONS_SHARE * share)
            self._bulk_deficit_s += elapsed_s * (share - used)
        exploration = self.devices[batch.device].exploration
        if batch.baseline_s is None:
            exploration.record_batch(elapsed_s)
        else:
            exploration.record_trial(elapsed_s - batch.baseline_s)
        if succeeded:
            self.record_run([request.size for request in batch.requests], elapsed_s, batch.device)
            # By the costs of the first device, as those of what waits: the drain rate corrects for all devices.
            predicted_s = self.devices[0].cost_model.predict_s(len(batch.requests), batch.longest, batch.total)
            self._drain.record(elapsed_s, predicted_s)
            if self._drain.is_refresh_due():
                self.queue.refresh()

    def record_run(self, sizes: Sequence[int], elapsed_s: float, device: int = 0) -> None:
        """Learn that requests of these `sizes` ran together without an error, in `elapsed_s` seconds."""
        count, longest = len(sizes), max(sizes)
        self.devices[device].cost_model.observe(count, longest, sum(sizes), elapsed_s)
        self.devices[device].token_limit.record_fit(count * longest)

    def record_too_large(self, sizes: list[int], device: int = 0) -> None:
        """Learn that requests of these `sizes` did not fit into the device together."""
        self.devices[device].token_limit.record_too_large(len(sizes) * max(sizes))

    def limit_count(self, limit: int | None) -> None:
        """Let no batch hold more requests than this, because failures are frequent; None for no such limit."""
        for device in self.devices:
            device.former.failure_limit = limit

    def cancel_batch(self, batch: Batch[RequestT], requests: Sequence[RequestT]) -> None:
        """Account for a batch of `decide` that did not run, and requeue these `requests` of it."""
        self._bulk_in_flight -= batch.priority is Priority.BULK
        self.queue.requeue(requests)

    def should_preempt(self, batch: Batch[RequestT]) -> bool:
        """Whether a bulk batch that is only prepared should wait again, because interactive requests have arrived."""
        return (
            batch.priority is Priority.BULK
            and self.queue.waiting(Priority.INTERACTIVE) > 0
            and self._bulk_deficit_s <= 0
        )

    def _own_s(self, size: int) -> float:
        try:
            return self.devices[0].former.own_s(size)
        except BaseException as error:  # noqa: BLE001  # of a custom cost model; forming a batch handles it
            users_error(error)
            return 0.0

    # Which lane is next.

    def _lanes_in_order(self) -> tuple[Priority, Priority]:
        if not self.queue.waiting(Priority.BULK):
            self._bulk_deficit_s = min(0.0, self._bulk_deficit_s)
        if self._bulk_deficit_s > 0 and not self._bulk_in_flight:
            return Priority.BULK, Priority.INTERACTIVE
        return Priority.INTERACTIVE, Priority.BULK

    # Whether the batch runs now.

    def _dispatch_or_wait(
        self, batch: Batch[RequestT], now: float, device: "_Device[RequestT]"
    ) -> tuple[DispatchReason | None, float]:
        """The reason to dispatch a batch that has room, or None and the time to ask again.

        To wait delays each request of the batch until the next arrival, and then by what that request adds to the
        batch. It saves the next request a batch of its own. So it shortens the sum of all latencies while the expected
        gap is less than ``seconds of a lone request / (requests + 1) - seconds that one more adds``.
        """
        policy, oldest_s = self.policy, batch.requests[0].arrival_s
        if now >= oldest_s + policy.max_age_s:
            return DispatchReason.AGE, now
        if not policy.max_wait_s:
            return DispatchReason.IDLE, now
        if now >= oldest_s + policy.max_wait_s:
            return DispatchReason.AGE, now
        if self.queue.waiting(batch.priority) > len(batch.requests):
            return DispatchReason.IDLE, now  # more requests wait behind this batch
        arrivals = self._arrivals[batch.priority]
        count, size = len(batch.requests) + 1, max(1, round(arrivals.mean_size))
        longest, total = max(batch.longest, size), batch.total + size
        with_one_more_s = device.cost_model.predict_s(count, longest, total)
        if count > device.former.count_limit:
            return DispatchReason.FULL, now
        if not device.former.is_allowed(count, longest, with_one_more_s):
            return DispatchReason.BUDGET, now
        added_s = with_one_more_s - batch.predicted_s
        worth_waiting_s = device.cost_model.predict_s(1, size, size) / count - added_s
        last_useful_s = arrivals.last_s + worth_waiting_s
        if arrivals.gap_s >= worth_waiting_s or now >= last_useful_s:
            return DispatchReason.IDLE, now
        latest_s = min(request.deadline_s for request in batch.requests) - batch.predicted_s
        if now >= latest_s:
            return DispatchReason.DEADLINE, now
        return None, min(oldest_s + policy.max_wait_s, oldest_s + policy.max_age_s, last_useful_s, latest_s)

    # Which batch runs.

    def _form_batch(self, anchor: RequestT, now: float, device: "_Device[RequestT]") -> Batch[RequestT]:
        is_bulk = anchor.priority is Priority.BULK
        batch = device.former.form(anchor)
        if not device.former.is_trusted:
            return batch  # the predictions are not good enough to shorten or extend it, or for a trial
        if is_bulk and now <= self._last_interactive_s + INTERACTIVE_RECENT_S:
            return self._shortened(batch, device)
        if is_bulk or not (self.policy.mixes_lanes and self.queue.waiting(Priority.BULK)):
            return self._trial_if_due(batch, device)
        # Bulk requests may run only as companions for long, and the bulk time limit has to stay up to date.
        if (oldest := self.queue.oldest(Priority.BULK)) is not None and device.bulk_time_limit.should_measure():
            self._shortened(device.former.form(oldest), device)
        left = self.queue.waiting(Priority.INTERACTIVE) - len(batch.requests)
        limit_s, waited_s = device.bulk_time_limit.seconds, now - batch.requests[0].arrival_s
        limits = COMPANIONS_LIMITS + COMPANIONS_LIMITS_PER_SHARE * self._interactive_share
        max_s = min(limit_s, limits * limit_s - waited_s) / math.sqrt(1 + left)
        return device.former.add_companions(batch, Priority.BULK, max(max_s, COMPANIONS_FACTOR * batch.predicted_s))

    def _shortened(self, batch: Batch[RequestT], device: "_Device[RequestT]") -> Batch[RequestT]:
        short = device.former.shorten(batch, device.bulk_time_limit.seconds)
        device.bulk_time_limit.add(batch, short)
        return short

    def _trial_if_due(self, batch: Batch[RequestT], device: "_Device[RequestT]") -> Batch[RequestT]:
        """The batch, or now and then a larger one in its place, to see whether that is as slow as predicted."""
        usual, limit, exploration = len(batch.requests), device.former.count_limit, device.exploration
        if not exploration.is_due:
            return batch
        count = exploration.count(usual, limit)
        if MIN_TRIAL_FACTOR * usual <= count <= self.queue.waiting(batch.priority):
            larger = device.former.form_full(batch.requests[0], count)
            baseline_s = batch.predicted_s / batch.total * larger.total
            loss_s = larger.predicted_s - baseline_s
            is_large = len(larger.requests) >= MIN_TRIAL_FACTOR * usual  # else too few of similar sizes wait
            if is_large and (batch.priority is Priority.BULK or loss_s <= batch.predicted_s):
                return replace(larger, baseline_s=baseline_s) if exploration.allow(loss_s) else batch
        exploration.skip()
        return batch

    def _take(self, batch: Batch[RequestT], device: int) -> Batch[RequestT]:
        self.queue.take(batch.requests)
        is_bulk = batch.priority is Priority.BULK
        self._bulk_in_flight += is_bulk
        other = Priority.INTERACTIVE if is_bulk else Priority.BULK
        contended = self.queue.waiting(other) > 0
        return replace(batch, contended=contended, device=device) if contended or device else batch


class _Device(Generic[RequestT]):
    """What is known of one device: the costs of its batches, and how large and how long these may be."""

    def __init__(self, policy: BatchPolicy, cost_model: CostModel, queue: RequestQueue[RequestT]) -> None:
        self.cost_model = cost_model
        self.token_limit = TokenLimit()
        self.former = BatchFormer(policy, cost_model, queue, self.token_limit)
        self.exploration = Exploration()
        self.bulk_time_limit = BulkTimeLimit(policy.max_bulk_batch_s)


def _bulk_part(batch: Batch[RequestT]) -> float:
    """The share of a batch, by size, that is bulk requests."""
    if batch.requests[-1].priority is batch.priority:  # companions of the other lane come last
        return float(batch.priority is Priority.BULK)
    return sum(request.size for request in batch.requests if request.priority is Priority.BULK) / batch.total
