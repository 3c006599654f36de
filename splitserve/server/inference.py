"""The one path that an inference takes through a face, for every protocol.

1. Credentials are checked: at once if they are listed or cached, otherwise in a task.
2. The request is received: gRPC messages and most HTTP bodies are complete already; for the others the same task waits.
3. It is decoded, checked against the limits of requests, and begun at the service (`InferenceService.begin`). Requested
   classifications are applied to the answer (`oip.classification`).
4. The service calls back with the answer or the error, which is encoded, logged in one line, and sent. The span of the request,
   if it is recorded, ends here.

A protocol is a subclass with its own ``_decode``, ``_encode``, ``_deliver`` and ``_fail``. There is one object per request, and a
task only if something must be awaited before the service is called: see docs/decisions/0016.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextvars import Context
from typing import ClassVar, Generic, TypeVar, TypeVarTuple

import msgspec

from splitserve.errors import SplitserveError
from splitserve.oip import classification
from splitserve.oip.limits import RequestLimits
from splitserve.oip.messages import InferenceService, InferRequest, InferResponse
from splitserve.oip.pending import Pending
from splitserve.server.callers import Authenticator, Caller, context_of
from splitserve.server.logs import RequestLog, http_status_of, log_request, status_of
from splitserve.server.request_ids import new_request_id
from splitserve.telemetry.requests import RequestRecorder
from splitserve.telemetry.traces import Attribute, TraceContext, Tracer, Tracing

A = TypeVar("A")
Arguments = TypeVarTuple("Arguments")


MAX_ID_LENGTH = 256
"""Characters of a request's id that are logged; a merged call has the ids of its requests."""


def _milliseconds(phases: Mapping[str, float]) -> dict[str, object]:
    return {f"{phase}_ms": round(1000 * seconds, 3) for phase, seconds in phases.items()}


class InferenceRules(msgspec.Struct, frozen=True):
    """What is the same for every inference of a face. ``authenticator`` None: calls are not authenticated.

    ``recorder`` None: nobody counts them. ``makes_ids``: a request without an id gets one, for the logs and its caller.
    """

    service: InferenceService
    limits: RequestLimits
    authenticator: Authenticator | None = None
    recorder: RequestRecorder | None = None
    makes_ids: bool = False


class Inference(ABC, Generic[A]):
    """One inference, from `begin` until it is answered, failed or cancelled. ``A`` is the protocol's type of answers.

    Args:
        rules: of the face.
        model: for the log, as far as it is known before the request is decoded.
        version: likewise.
        is_received: whether the request can be decoded now; otherwise after `_receive`.
    """

    protocol: ClassVar[str]
    """As it is counted: of `splitserve.telemetry.families.PROTOCOLS`."""

    __slots__ = ("_began", "_context", "_is_over", "_is_received", "_pending", "_rules", "model", "request", "version")

    def __init__(self, rules: InferenceRules, model: str = "", version: str = "", *, is_received: bool = True) -> None:
        self._rules = rules
        self._is_received = is_received
        self.model = model
        self.version = version
        self._began = time.monotonic()
        self._context: Context | None = None
        self._pending: Pending | None = None
        self._is_over = False
        self.request: InferRequest | None = None
        """Once it is decoded."""

    def begin(self) -> None:
        """Begin; the answer or the error is delivered later.

        Raises:
            Exception: the request is refused at once, and nothing is delivered.
        """
        try:
            authenticator = self._rules.authenticator
            if authenticator is None and self._is_received:
                self._begin_at_service()
                return
            caller = None if authenticator is None else authenticator.recognise(self._credentials())
            if caller is not None and self._is_received:
                self._start(caller)
            else:
                self._pending = asyncio.get_running_loop().create_task(self._start_later(caller))
        except Exception as error:
            self._is_over = True
            self._in_context(self._failed, error)
            raise

    def refuse(self, error: Exception) -> None:
        """Count and log it as failed, instead of `begin`: nothing is delivered."""
        self._is_over = True
        self._failed(error)

    async def _start_later(self, caller: Caller | None) -> None:
        """Start after credentials and body have been awaited."""
        try:
            authenticator = self._rules.authenticator
            if caller is None and authenticator is not None:
                caller = await authenticator.identify(self._credentials())
            await self._receive()
            self._start(caller)
        except Exception as error:
            self._in_context(self._finish, error)

    def _start(self, caller: Caller | None) -> None:
        if caller is None:
            self._begin_at_service()
        else:
            self._context = context_of(caller)
            self._context.run(self._begin_at_service)

    def _begin_at_service(self) -> None:
        """Decode the request and begin it at the service."""
        rules = self._rules
        request = self.request = self._decode()
        if Tracing.tracer is not None:
            request = self.request = self._traced(Tracing.tracer, request)
        self.model, self.version = request.model, request.version
        rules.limits.check(request)
        on_answer = self._finish if self._context is None else self._finish_in_context
        if request.outputs:
            self._pending = classification.begin(rules.service, request, on_answer)
        else:
            self._pending = rules.service.begin(request, on_answer)

    def _traced(self, tracer: Tracer, request: InferRequest) -> InferRequest:
        """The request, with a span if it is recorded."""
        trace = tracer.begin(request.trace, self._began, begins_traces=self._is_from_client())
        return request if trace is request.trace else msgspec.structs.replace(request, trace=trace)

    def _end_trace(self, tracer: Tracer, release: str, code: str, http_status: int) -> None:
        """Export the span of the request, if it is recorded."""
        request = self.request
        if request is None:  # it was refused before it was decoded
            trace = tracer.begin(self._given_trace(), self._began, begins_traces=self._is_from_client())
        else:
            trace = request.trace
        if trace is None or (span := trace.span) is None:
            return
        span.name, attributes = self._named_span(http_status)
        attributes["splitserve.model"] = self.model[:128]
        if release:
            attributes["splitserve.release"] = release[:32]
        if request is not None:
            attributes["splitserve.rows"] = request.n_rows
            if request.logged_id and self._rules.makes_ids:
                attributes["splitserve.request_id"] = request.logged_id[:MAX_ID_LENGTH]
        span.attributes = {"splitserve.batch.requests": 1, **span.attributes, **attributes}
        tracer.end(span, code)
        if code == "OK" and (recorder := self._rules.recorder) is not None:
            recorder.exemplify(self.protocol, time.monotonic() - self._began, span.trace_id, span.span_id)

    def _in_context(self, act: Callable[[*Arguments], None], *arguments: *Arguments) -> None:
        """Call ``act`` in the context of the caller, if the caller is known."""
        if self._context is None:
            act(*arguments)
        else:
            self._context.run(act, *arguments)

    def _finish_in_context(self, outcome: InferResponse | Exception) -> None:
        self._in_context(self._finish, outcome)

    def _finish(self, outcome: InferResponse | Exception) -> None:
        """The service has answered, or failed."""
        self._is_over = True
        pending, self._pending = self._pending, None  # breaks a reference cycle, which only the garbage collector would free
        if isinstance(outcome, Exception):
            self._failed(outcome)
            self._fail(outcome)
            return
        encoding_at = time.monotonic()
        try:
            answer = self._encode(outcome)
        except Exception as error:
            self._failed(error)
            self._fail(error)
            return
        self.version = outcome.version
        if Tracing.tracer is not None:
            self._end_trace(Tracing.tracer, self.version, "OK", 200)
        recorder = self._rules.recorder
        if recorder is not None:
            recorder.succeeded(self.protocol, self.model, self.version, self._began, encoding_at)
        if RequestLog.every and RequestLog.takes():
            encode_s = time.monotonic() - encoding_at
            phases = outcome.phases or getattr(pending, "phases", None)  # `QueuedRequest` has them
            self._log(None, self._facts() | _milliseconds({**(phases() if phases else {}), "encode": encode_s}))
        self._deliver(answer)

    def cancel(self) -> None:
        """The caller has disconnected: deliver nothing. No effect once an answer or an error was delivered."""
        if self._is_over:
            return
        self._is_over = True
        if self._pending is not None:
            self._pending.cancel()
        self._in_context(self._failed, asyncio.CancelledError())

    def _failed(self, error: BaseException) -> None:
        """Count and log a request that failed, or whose caller has left."""
        stage, release = "", self.version
        if isinstance(error, SplitserveError):
            stage, release = error.stage, error.pair or release
        if (recorder := self._rules.recorder) is not None:
            recorder.failed(self.protocol, self.model, release, status_of(error))
        if Tracing.tracer is not None:
            self._end_trace(Tracing.tracer, release, status_of(error), http_status_of(error))
        if isinstance(error, Exception) or RequestLog.takes():
            facts = self._facts()
            if self.request is not None and self.request.log_id:
                self._tell_id(self.request.log_id)
            elif "request_id" not in facts and (identity := self._named_id()):
                facts["request_id"] = identity[:MAX_ID_LENGTH]
            self._log(error, facts | ({"failed_stage": stage} if stage else {}))

    def _with_id(self, request: InferRequest) -> InferRequest:
        """The request, with an id for the logs if it has none."""
        if request.id or request.log_id or not self._rules.makes_ids:
            return request
        return msgspec.structs.replace(request, log_id=new_request_id())

    def _named_id(self) -> str:
        """The id that the caller has given beside the request, or one that is made and told to the caller, or ""."""
        identity = self._given_id()
        if not identity and self._rules.makes_ids:
            identity = new_request_id()
            self._tell_id(identity)
        return identity

    def _log(self, error: BaseException | None, facts: Mapping[str, object]) -> None:
        log_request("infer", self.model, self.version, self._began, error, facts)

    def _facts(self) -> dict[str, object]:
        """What its line in the log says of the request, if it could be decoded."""
        request = self.request
        if request is None:
            return {}
        facts: dict[str, object] = {"rows": request.n_rows, "bytes": sum([len(tensor.raw) for tensor in request.inputs])}
        if request.trace is not None and request.trace.traceparent:
            facts["trace_id"] = request.trace.trace_id
        return {"request_id": name[:MAX_ID_LENGTH], **facts} if (name := request.logged_id) else facts

    def _given_id(self) -> str:
        """The id in a header of the request; "" without one."""
        return ""

    def _tell_id(self, identity: str) -> None:
        """Send this id with the answer or the error, in a header."""

    def _is_from_client(self) -> bool:
        """Whether no other stage has decided before whether it is traced."""
        return True

    def _given_trace(self) -> TraceContext | None:
        """The context in the headers of the request."""
        return None

    @abstractmethod
    def _named_span(self, http_status: int) -> tuple[str, dict[str, Attribute]]:
        """The name of its span, and what the conventions of the protocol say of it."""

    @abstractmethod
    def _credentials(self) -> Sequence[str]:
        """The values of the request's ``authorization`` headers."""

    async def _receive(self) -> None:
        """Wait until `_decode` can be called."""

    @abstractmethod
    def _decode(self) -> InferRequest:
        """The request, from the protocol's bytes. May raise."""

    @abstractmethod
    def _encode(self, response: InferResponse) -> A:
        """The answer in the form of the protocol. May raise."""

    @abstractmethod
    def _deliver(self, answer: A) -> None:
        """Send the answer."""

    @abstractmethod
    def _fail(self, error: Exception) -> None:
        """Send the error."""
