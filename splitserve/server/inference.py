"""The one path that an inference takes through a face, for every protocol.

1. Credentials are checked: at once if they are listed or cached, otherwise in a task.
2. The request is received: gRPC messages and most HTTP bodies are complete already; for the others the same task waits.
3. It is decoded, checked against the limits of requests, and begun at the service (`InferenceService.begin`). Requested
   classifications are applied to the answer (`oip.classification`).
4. The service calls back with the answer or the error, which is encoded, logged in one line, and sent.

A protocol is a subclass with its own ``_decode``, ``_encode``, ``_deliver`` and ``_fail``. There is one object per request, and a
task only if something must be awaited before the service is called: see docs/decisions/0016.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextvars import Context
from typing import ClassVar, Generic, TypeVar, TypeVarTuple

import msgspec

from splitserve.errors import SplitserveError
from splitserve.oip import classification
from splitserve.oip.limits import RequestLimits
from splitserve.oip.messages import InferenceService, InferRequest, InferResponse
from splitserve.oip.pending import Pending
from splitserve.server.callers import Authenticator, Caller, context_of
from splitserve.server.logs import RequestLog, log_request, status_of
from splitserve.telemetry.requests import RequestRecorder

A = TypeVar("A")
Arguments = TypeVarTuple("Arguments")


class InferenceRules(msgspec.Struct, frozen=True):
    """What is the same for every inference of a face. ``authenticator`` None: calls are not authenticated.

    ``recorder`` None: nobody counts them.
    """

    service: InferenceService
    limits: RequestLimits
    authenticator: Authenticator | None = None
    recorder: RequestRecorder | None = None


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

    __slots__ = ("_began", "_context", "_is_over", "_is_received", "_pending", "_rules", "model", "version")

    def __init__(self, rules: InferenceRules, model: str = "", version: str = "", *, is_received: bool = True) -> None:
        self._rules = rules
        self._is_received = is_received
        self.model = model
        self.version = version
        self._began = time.monotonic()
        self._context: Context | None = None
        self._pending: Pending | None = None
        self._is_over = False

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
            self._in_context(self._log, error)
            raise

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
        request = self._decode()
        self.model, self.version = request.model, request.version
        rules.limits.check(request)
        on_answer = self._finish if self._context is None else self._finish_in_context
        if request.outputs:
            self._pending = classification.begin(rules.service, request, on_answer)
        else:
            self._pending = rules.service.begin(request, on_answer)

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
        self._pending = None  # breaks a reference cycle, which only the garbage collector would free
        if isinstance(outcome, Exception):
            self._log(outcome)
            self._fail(outcome)
            return
        encoding_at = time.monotonic()
        try:
            answer = self._encode(outcome)
        except Exception as error:
            self._log(error)
            self._fail(error)
            return
        self.version = outcome.version
        recorder = self._rules.recorder
        if recorder is not None:
            recorder.succeeded(self.protocol, self.model, self.version, self._began, encoding_at)
        if RequestLog.is_complete:
            self._log(None)
        self._deliver(answer)

    def cancel(self) -> None:
        """The caller has disconnected: deliver nothing. No effect once an answer or an error was delivered."""
        if self._is_over:
            return
        self._is_over = True
        if self._pending is not None:
            self._pending.cancel()
        self._in_context(self._log, asyncio.CancelledError())

    def _log(self, error: BaseException | None) -> None:
        if error is not None and (recorder := self._rules.recorder) is not None:
            release = error.pair if isinstance(error, SplitserveError) and error.pair else self.version
            recorder.failed(self.protocol, self.model, release, status_of(error))
        log_request("infer", self.model, self.version, self._began, error)

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
