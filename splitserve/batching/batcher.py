"""Natural batching: while a call is in flight, arriving requests queue, and are sent merged as the next call.

No request waits for a timer: one that finds no call in flight is sent at once. The more requests arrive, the more are merged, and
share the fixed cost of a call. Row-major tensors are joined and split as bytes; there are no numerics here, and no transport.
A caller receives its answer by a callback, or awaits it; there is an asyncio task for each call, not for each request.

1. A request joins those that it is compatible with: same model, version, inputs (names, datatypes, inner shapes), requested
   outputs and parameters. All compatible requests of one model and version share its calls in flight, in turn.
2. When another call may be sent, callers contribute one request each, round robin, until the limits of a batch are reached: one
   caller's flood does not delay the others.
3. A request that its caller cancels leaves the queue at once; one whose deadline has passed fails here. Neither is sent.
4. A merged call has the latest deadline of its requests; each still gets its own answer, or `DeadlineExceeded` in time.
5. If a call fails because of its content, each of its requests is sent once more, alone: the caller of the bad row fails, the
   others do not. Likewise if its version is not found, and only some of its callers have named that version.
6. Admission control (`splitserve.batching.admission`) limits what is queued and in flight; one request more is refused at once,
   or a queued one of lower priority is refused in its place.
7. Background requests, such as jobs, are in a batch only where others leave rows over. They are refused while others wait long,
   and admission control neither counts them nor learns from their calls.
8. If the response does not have as many rows as were sent, all requests fail: a caller never gets another's row.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence

from splitserve.batching.admission import BACKGROUND_PRIORITY, HIGHEST_PRIORITY, AdaptiveLimit, kind_of_refusal
from splitserve.batching.merging import compatibility_key, merge, split
from splitserve.batching.queue import OVERDUE_S, Batch, BatchCall, BatchLimits, CompatibleRequests, ModelQueue, QueuedRequest
from splitserve.errors import (
    Cancelled,
    DeadlineExceeded,
    Internal,
    NotFound,
    Overloaded,
    PermissionDenied,
    SplitserveError,
    Unauthenticated,
    Unavailable,
    Unsupported,
)
from splitserve.oip.messages import NO_DEADLINE, InferRequest, InferResponse, OnAnswer
from splitserve.oip.pending import Pending, awaited
from splitserve.oip.statistics import Statistics
from splitserve.telemetry.traces import Tracing

SHARED_ERRORS = (
    Cancelled,
    DeadlineExceeded,
    NotFound,
    Overloaded,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
    Unsupported,
)
"""Errors that no single request of a batch causes. Any other may be one request's, so that each is tried alone."""

_EXPIRY_INTERVAL_S = 0.005
"""Deadlines within this interval are handled together."""

_MAX_IDLE_QUEUES = 256
"""Models and versions whose measurements are kept although they have no requests."""

_MAX_ALONE_AT_ONCE = 16
"""Requests of a failed batch that are tried alone at the same time."""

SendRequest = Callable[[InferRequest], Awaitable[InferResponse]]


class Batcher:
    """Merges requests in front of what answers them.

    Args:
        send: answers one request, merged or not.
        limits: of all models, or by model name.
        send_inline: answers a request that is sent alone within this iteration of the event loop, which saves a task; None: it
            takes longer, so ``send`` is to be used.
        n_backends: how many replicas ``send`` distributes calls over.
        statistics: where requests are counted.
        is_hop: whether ``send`` calls another service, rather than computing here.
        to_caller: turns what ``send`` raised into the error that the caller of a request gets.
        clock: monotonic seconds, the same as deadlines are on.
    """

    def __init__(
        self,
        send: SendRequest,
        limits: Callable[[str], BatchLimits] | BatchLimits | None = None,
        *,
        send_inline: Callable[[InferRequest], InferResponse | None] | None = None,
        n_backends: Callable[[], int] = lambda: 1,
        statistics: Statistics | None = None,
        is_hop: bool = False,
        to_caller: Callable[[InferRequest, Exception], Exception] = lambda _, error: error,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        fixed = limits if isinstance(limits, BatchLimits) else BatchLimits()
        self._send = send
        self._send_inline = send_inline
        self._limits = limits if callable(limits) else lambda _: fixed
        self._n_backends = n_backends
        self._statistics = statistics or Statistics()
        self._durations = self._statistics.durations
        self._call_phase = "hop" if is_hop else "compute"
        self._call_durations = self._durations.hop if is_hop else self._durations.compute
        self.n_refused = dict.fromkeys(("queue_full", "queue_wait", "deadline", "background", "preempted"), 0)
        """Requests that were refused, by the reason."""
        self._to_caller = to_caller
        self._clock = clock
        self._queues: dict[tuple[str, str], ModelQueue] = {}
        self._compatible: dict[Hashable, CompatibleRequests] = {}
        self._calls: set[BatchCall] = set()
        self._expiry_at = NO_DEADLINE
        self._expiry: asyncio.TimerHandle | None = None
        self._on_cancel = self._cancel  # bound once, not for each request

    async def infer(self, request: InferRequest, *, is_mergeable: bool = True, priority: int = HIGHEST_PRIORITY) -> InferResponse:
        """As `begin`, awaited.

        Raises:
            SplitserveError: as `begin`, and what its callback would get.
        """
        return await awaited(lambda on_answer: self.begin(request, on_answer, is_mergeable=is_mergeable, priority=priority))

    def begin(
        self,
        request: InferRequest,
        on_answer: OnAnswer,
        *,
        is_mergeable: bool = True,
        priority: int = HIGHEST_PRIORITY,
        answer_bytes: int = 0,
        began_at: float | None = None,
    ) -> Pending:
        """Queue a request; it is merged with compatible ones if the signature allows that.

        Args:
            request: already checked against the signature, so that it does not fail others in its batch by its form.
            on_answer: called once, later, with the response or an error: `DeadlineExceeded`, or what sending raised.
            is_mergeable: whether all inputs and outputs have a leading dimension of independent rows.
            priority: 1 is the highest; under overload, larger numbers are refused first.
            answer_bytes: lower bound of the answer's size; batches are limited by the larger of their inputs and answers.
            began_at: point on the clock where work for the request began; now by default.

        Raises:
            Overloaded: the queue is full, or the estimated wait exceeds its limit or the request's deadline.
            DeadlineExceeded: the deadline has passed.
        """
        compatible = self._compatible_with(request, is_mergeable and bool(request.inputs))
        queue = compatible.queue
        now = self._clock()
        if request.deadline <= now:
            raise DeadlineExceeded("deadline exceeded before the work began")
        preempted = None
        is_background = priority >= BACKGROUND_PRIORITY
        if reason := queue.background_refusal_reason(now) if is_background else queue.refusal_reason(request.deadline - now):
            preempted = queue.preemptible.lowest(below=priority)
            if preempted is None:
                self.n_refused[kind_of_refusal(reason)] += 1
                raise Overloaded(reason, model=request.model)
            self._dequeue(preempted)
        inputs = request.inputs
        n_rows = inputs[0].shape[0] if compatible.is_mergeable else 1
        n_bytes = len(inputs[0].raw) if len(inputs) == 1 else sum([len(tensor.raw) for tensor in inputs])
        queued = QueuedRequest(
            request,
            on_answer,
            self._on_cancel,
            compatible,
            now,
            now if began_at is None else began_at,
            priority,
            is_background,
            n_rows,
            n_bytes if n_bytes > answer_bytes else answer_bytes,
        )
        compatible.add(queued)
        self._compatible[compatible.key] = compatible
        if request.deadline < self._expiry_at:
            self._schedule_expiry(request.deadline - now)
        if not queue.is_scheduled:
            self._dispatch_soon(queue)
        if preempted is not None:
            self.n_refused["preempted"] += 1
            self._fail([preempted], Overloaded("preempted by a request of higher priority", model=request.model))
        return queued

    def _cancel(self, queued: QueuedRequest) -> None:
        if queued.on_answer is not None:
            queued.compatible.queue.statistics.failed(self._clock() - queued.began_at)
            self._finish(queued)
            if queued.call is not None:
                queued.call.cancel_if_abandoned()

    def _finish(self, queued: QueuedRequest) -> OnAnswer | None:
        """Forget a request, queued or in flight. Returns its callback, if that is still to be called."""
        on_answer, queued.on_answer = queued.on_answer, None
        if on_answer is not None:
            queued.compatible.queue.discard(queued)
            if queued.is_queued:
                self._dequeue(queued)
        return on_answer

    def _dequeue(self, queued: QueuedRequest) -> None:
        queued.compatible.remove(queued)
        self._drop_if_empty(queued.compatible)

    def _answer(self, queued: QueuedRequest, outcome: InferResponse | Exception) -> None:
        if (on_answer := self._finish(queued)) is not None:
            _call_back(on_answer, outcome)

    def _fail(self, requests: Sequence[QueuedRequest], error: Exception) -> None:
        now = self._clock()
        for queued in requests:
            if queued.on_answer is not None:
                queued.compatible.queue.statistics.failed(now - queued.began_at)
                self._answer(queued, self._to_caller(queued.request, _copied(error)))

    @property
    def queues(self) -> Mapping[tuple[str, str], ModelQueue]:
        """What is queued and in flight, by model and version. Those without requests are forgotten now and then."""
        return self._queues

    def first_limit(self, model: str) -> float:
        """How many requests a queue of this model accepts before anything was measured."""
        return AdaptiveLimit(self._limits(model).max_queue_wait_ms / 1000).limit

    def occupancy(self, model: str) -> tuple[int, int]:
        """Requests of a model that are queued, and calls for it that are in flight."""
        queues = [queue for (name, _), queue in self._queues.items() if name == model]
        return sum(queue.n_queued for queue in queues), sum(queue.n_in_flight for queue in queues)

    async def close(self) -> None:
        """Fail what is queued and cancel what is in flight. Drain before: callers get `Unavailable`."""
        if self._expiry is not None:
            self._expiry.cancel()
        while (requests := self._requests) or self._calls:
            self._fail(list(requests), Unavailable("the service is stopping"))
            for call in self._calls:
                call.task.cancel()
            await asyncio.sleep(0)

    @property
    def _requests(self) -> set[QueuedRequest]:
        """Those queued and those in flight."""
        return {queued for queue in self._queues.values() for queued in queue.requests}

    def _compatible_with(self, request: InferRequest, is_mergeable: bool) -> CompatibleRequests:
        key = compatibility_key(request) if is_mergeable else object()
        compatible = self._compatible.get(key)
        if compatible is None:
            name = (request.model, request.version)
            queue = self._queues.get(name)
            if queue is None:
                self._forget_idle_queues()
                queue = self._queues[name] = ModelQueue(self._limits(request.model), self._statistics.of(*name), self._call_phase)
            compatible = CompatibleRequests(key, queue, is_mergeable)
        return compatible

    def _forget_idle_queues(self) -> None:
        if len(self._queues) >= _MAX_IDLE_QUEUES:
            self._queues = {name: queue for name, queue in self._queues.items() if queue.compatible or queue.n_in_flight}

    def _drop_if_empty(self, compatible: CompatibleRequests) -> None:
        if not compatible.n_queued:
            compatible.queue.compatible.pop(compatible.key, None)
            self._compatible.pop(compatible.key, None)

    def _dispatch_soon(self, queue: ModelQueue) -> None:
        queue.is_scheduled = True
        queue.loop.call_soon(self._dispatch, queue)

    def _dispatch(self, queue: ModelQueue) -> None:
        """Send every batch that may be sent now."""
        queue.is_scheduled = False
        while queue.compatible:
            now, n_backends = self._clock(), max(1, self._n_backends())
            if (free_at := queue.free_at(n_backends, now)) > now:
                queue.dispatch_at(free_at, now, self._dispatch)
                return
            due = (each for each in queue.compatible.values() if each.due_at() <= now)
            compatible = next(due, None)
            if compatible is not None and not compatible.has_foreground:
                compatible = next((each for each in due if each.has_foreground), compatible)
            if compatible is None:
                queue.dispatch_at(min(each.due_at() for each in queue.compatible.values()), now, self._dispatch)
                return
            if not compatible.has_foreground and (background_at := queue.background_at(n_backends, now)) > now:
                queue.dispatch_at(background_at, now, self._dispatch)
                return
            batch = compatible.take_batch(now)
            queue.compatible.move_to_end(compatible.key)
            self._drop_if_empty(compatible)
            self._fail(batch.expired, DeadlineExceeded("deadline exceeded before the request was sent"))
            if len(batch.requests) == 1 and self._answer_inline(queue, batch.requests[0]):
                if queue.compatible and not queue.is_scheduled:
                    self._dispatch_soon(queue)  # other work gets its turn between two answers
                return
            if batch.requests:
                self._start_call(queue, batch)

    def _start_call(self, queue: ModelQueue, batch: Batch) -> None:
        # A full call does not block the next one; any other does until it is overdue.
        blocking_s = 0.0 if batch.is_full else max(OVERDUE_S, 2 * queue.admission.alone_s)
        call = BatchCall(batch.requests, overdue_at=self._clock() + blocking_s)
        call.task = queue.loop.create_task(self._run_call(queue, call))
        call.task.add_done_callback(lambda _: self._call_ended(queue, call))  # runs even if it is cancelled before it began
        self._calls.add(call)
        queue.calls.add(call)
        for queued in batch.requests:
            queued.call = call

    def _answer_inline(self, queue: ModelQueue, queued: QueuedRequest) -> bool:
        """Answer a request at once. False if its answer takes longer: it is still to be sent."""
        if self._send_inline is None:
            return False
        call = BatchCall([queued], overdue_at=0.0)
        call.sent_at = self._clock()
        try:
            response = self._send_inline(queued.request)
            if response is None:
                return False
            self._check_rows(queued, response)
        except Exception as error:
            self._fail_alone(queue, queued, error)
        else:
            queued.call = call
            self._succeed_alone(queue, call, queued, response)
            self._learn(queue, call)
            call.requests.clear()  # breaks a reference cycle, which only the garbage collector would free
        return True

    async def _run_call(self, queue: ModelQueue, call: BatchCall) -> None:
        call.sent_at = self._clock()
        if await self._send_call(queue, call):
            self._learn(queue, call)

    def _learn(self, queue: ModelQueue, call: BatchCall) -> None:
        """What one call that answered all of its requests shows of the cost of rows and of waiting times."""
        call_s = call.answered_at - call.sent_at  # without the time that the callbacks took
        n_rows = sum([queued.n_rows for queued in call.requests])
        queue.cost.learn(n_rows, call_s)
        first = call.requests[0]
        if first.is_background:
            return
        queue.background_share.active_at = call.answered_at
        queue.foreground_wait.learn(call.sent_at - first.queued_at, call.sent_at)
        n_foreground = len(call.requests) - sum([queued.is_background for queued in call.requests])
        alone_s = max(call_s - queue.cost.row_s * (n_rows - first.n_rows), call_s / len(call.requests))
        queue.admission.learn(max(first.n_found, n_foreground), call.sent_at - first.queued_at, call_s, min(alone_s, call_s))

    def _call_ended(self, queue: ModelQueue, call: BatchCall) -> None:
        self._calls.discard(call)
        queue.calls.discard(call)
        error = None if call.task.cancelled() else call.task.exception()
        if error is not None:  # a defect of this module, for which no caller may wait forever
            self._fail(call.requests, Internal("internal error"))
        call.requests.clear()  # breaks a reference cycle, which only the garbage collector would free
        self._dispatch(queue)
        if error is not None:
            raise error

    async def _send_call(self, queue: ModelQueue, call: BatchCall) -> bool:
        """Answer all requests of a call. True if one call answered them all."""
        requests = call.requests
        if len(requests) == 1:
            return await self._send_alone(queue, call, requests[0])
        try:
            merged = merge([queued.request for queued in requests])
            response = await (self._send(merged) if merged.trace is None else self._send_traced(merged))
            parts = split(response, [queued.n_rows for queued in requests])
        except Exception as error:
            if _concerns_all(error, requests):
                if not requests[0].is_background:
                    queue.record_failure(error)
                self._fail(requests, error)
                return False
            for start in range(0, len(requests), _MAX_ALONE_AT_ONCE):
                some = requests[start : start + _MAX_ALONE_AT_ONCE]
                await asyncio.gather(*[self._send_alone(queue, call, queued) for queued in some])
            return False
        call.answered_at = self._clock()
        self._record_success(queue, call, [queued for queued in requests if queued.on_answer is not None])
        queue.discard_all(requests)
        model, version, parameters = response.model, response.version, response.parameters
        for queued, outputs in zip(requests, parts, strict=True):
            on_answer, queued.on_answer = queued.on_answer, None
            if on_answer is not None:
                _call_back(on_answer, InferResponse(model, version, outputs, queued.request.id, parameters))
        return True

    async def _send_traced(self, merged: InferRequest) -> InferResponse:
        """Send a merged call; if it is recorded, its span ends with it."""
        if (tracer := Tracing.tracer) is None or merged.trace is None or merged.trace.span is None:
            return await self._send(merged)
        with tracer.ending(merged.trace):
            return await self._send(merged)

    async def _send_alone(self, queue: ModelQueue, call: BatchCall, queued: QueuedRequest) -> bool:
        if queued.on_answer is None:
            return False
        try:
            response = await self._send(queued.request)
            self._check_rows(queued, response)
        except Exception as error:
            self._fail_alone(queue, queued, error)
            return False
        self._succeed_alone(queue, call, queued, response)
        return True

    def _check_rows(self, queued: QueuedRequest, response: InferResponse) -> None:
        if queued.compatible.is_mergeable:
            split(response, [queued.n_rows])

    def _fail_alone(self, queue: ModelQueue, queued: QueuedRequest, error: Exception) -> None:
        if not queued.is_background:
            queue.record_failure(error)
        self._fail([queued], error)

    def _succeed_alone(self, queue: ModelQueue, call: BatchCall, queued: QueuedRequest, response: InferResponse) -> None:
        call.answered_at = self._clock()
        if queued.on_answer is not None:
            self._record_success(queue, call, [queued])
            self._answer(queued, response)

    def _record_success(self, queue: ModelQueue, call: BatchCall, requests: Sequence[QueuedRequest]) -> None:
        if not requests:
            return
        now, n_requests = call.answered_at, len(requests)
        waits_s = [call.sent_at - queued.queued_at for queued in requests]
        queued_s, call_s = sum(waits_s), now - call.sent_at
        total_s = sum([now - queued.began_at for queued in requests])
        infer_s = n_requests * call_s
        n_rows = sum([queued.n_rows for queued in requests]) if n_requests > 1 else requests[0].request.n_rows
        self._durations.record_call(self._call_durations, waits_s, call_s, n_rows)
        queue.statistics.succeeded(
            n_requests,
            n_rows=n_rows,
            total_ns=_ns(total_s),
            parts={"input": _ns(total_s - queued_s - infer_s), "queue": _ns(queued_s), "infer": _ns(infer_s), "output": 0},
        )

    def _schedule_expiry(self, delay_s: float) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
        delay_s = max(delay_s, _EXPIRY_INTERVAL_S)
        self._expiry_at = self._clock() + delay_s
        self._expiry = asyncio.get_running_loop().call_later(delay_s, self._expire)

    def _expire(self) -> None:
        """Fail every request whose deadline has passed, queued or in flight, and schedule the next expiry."""
        self._expiry_at, self._expiry = NO_DEADLINE, None
        now, next_deadline = self._clock(), NO_DEADLINE
        expired = []
        for queued in self._requests:
            if queued.request.deadline <= now:
                expired.append(queued)
            else:
                next_deadline = min(next_deadline, queued.request.deadline)
        if next_deadline != NO_DEADLINE:
            self._schedule_expiry(next_deadline - now)
        self._fail(expired, DeadlineExceeded("deadline exceeded before the answer arrived"))
        for call in self._calls:
            call.cancel_if_abandoned()


def _call_back(on_answer: OnAnswer, outcome: InferResponse | Exception) -> None:
    """An exception in one callback does not keep the others from their answers."""
    try:
        on_answer(outcome)
    except Exception as error:
        asyncio.get_running_loop().call_exception_handler({"message": "answer callback failed", "exception": error})


def _concerns_all(error: Exception, requests: Sequence[QueuedRequest]) -> bool:
    """Whether each of the requests would have failed with this error alone.

    A version that is not found is no end for those that did not name it.
    """
    if isinstance(error, NotFound) and len({queued.request.is_pinned for queued in requests}) > 1:
        return False
    return isinstance(error, SHARED_ERRORS)


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def _copied(error: Exception) -> Exception:
    """A copy for each caller, which adds to it where the error happened."""
    if not isinstance(error, SplitserveError):
        return error
    copy = type(error)(error.message, **error.metadata)
    copy.__cause__ = error.__cause__ or error
    return copy
