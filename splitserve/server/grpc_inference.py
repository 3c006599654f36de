"""ModelInfer and ModelStreamInfer: the bytes of a request in, the bytes of its answer out, and no task where none is needed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from splitserve.api.inference import inference_pb2 as pb
from splitserve.batching.pending import OnAnswer, Pending, awaited, deliver
from splitserve.errors import SplitserveError
from splitserve.oip import classification, protobuf
from splitserve.oip.limits import RequestLimits
from splitserve.oip.messages import InferenceService, InferRequest, InferResponse
from splitserve.server.callers import Authenticator
from splitserve.server.logs import log_request
from splitserve.wire.byte_budget import ByteBudget, Reservation
from splitserve.wire.grpc.call import Call


def credentials(call: Call) -> list[str]:
    """What the caller shows of who it is."""
    return [value for key, value in call.metadata if key == "authorization"]


class GrpcInference:
    """What a gRPC face answers inference requests with.

    Args:
        service: what is served. One that can `begin` is not waited for in a task.
        limits: of requests.
        deadline: of a request whose caller leaves so many seconds, or says nothing of that.
        named: the error that a caller is told.
        authenticator: learns who calls; None: nobody is asked.
        budget: of the bytes that messages on streams hold.
    """

    def __init__(
        self,
        service: InferenceService,
        *,
        limits: RequestLimits,
        deadline: Callable[[float | None], float],
        named: Callable[[Exception], SplitserveError],
        authenticator: Authenticator | None,
        budget: ByteBudget,
    ) -> None:
        self._service = service
        self._limits = limits
        self._deadline = deadline
        self._authenticator = authenticator
        self._budget = budget
        self.named = named
        direct: Callable[[InferRequest, OnAnswer], Pending] | None = None if authenticator else getattr(service, "begin", None)
        self._direct = direct

    def begin(self, data: bytes, call: Call, on_end: Callable[[bytes | Exception], None]) -> Pending:
        """Answer ModelInfer.

        Raises:
            SplitserveError: the request is refused at once, and ``on_end`` is not told.
        """
        message = protobuf.parse(pb.ModelInferRequest, data)
        return self._infer(message, call, call.remaining_s(), partial(_encoded, on_end))

    async def infer(self, data: bytes, call: Call) -> bytes:
        """The same in a task."""
        return await awaited(partial(self.begin, data, call))

    def begin_on_stream(self, data: bytes, call: Call, answer: Callable[[bytes], None]) -> Pending | None:
        """Answer a message on a stream, where an error is an answer. Raises nothing."""
        reservation = self._budget.reservation()
        one = _OnStream(self, reservation, answer)
        try:
            reservation.reserve(len(data))
            if self._authenticator is None:
                one.pending = self.infer_message(one, data, call, one.end)
            else:
                known = self._infer_for_known(self._authenticator, one, data, call)
                one.pending = asyncio.get_running_loop().create_task(deliver(known, one.end))
        except Exception as error:
            one.end(error)
            return None
        return one

    async def _infer_for_known(self, authenticator: Authenticator, one: _OnStream, data: bytes, call: Call) -> InferResponse:
        await authenticator.authenticate(credentials(call), is_open=False)
        return await awaited(partial(self.infer_message, one, data, call))

    def infer_message(self, one: _OnStream, data: bytes, call: Call, on_answer: OnAnswer) -> Pending:
        """Begin with a message of a stream. Raises as `begin`."""
        message = protobuf.parse(pb.ModelInferRequest, data)
        one.identity = message.id
        return self._infer(message, call, None, on_answer)

    def _infer(self, message: Any, call: Call, remaining_s: float | None, on_answer: OnAnswer) -> Pending:
        request = protobuf.decode_request(message, self._deadline(remaining_s), call.peer)
        self._limits.check(request)
        one = _Logged(request, on_answer)
        try:
            if self._direct is not None and not classification.is_wanted(request):
                one.pending = self._direct(request, one.end)
            else:
                answer = classification.infer(self._service, request)
                one.pending = asyncio.get_running_loop().create_task(deliver(answer, one.end))
        except Exception as error:
            one.log(request.version, error)
            raise
        return one


def _encoded(on_end: Callable[[bytes | Exception], None], outcome: InferResponse | Exception) -> None:
    if not isinstance(outcome, Exception):
        try:
            on_end(protobuf.encode_response(outcome).SerializeToString())
            return
        except ValueError as error:  # an answer of the wrong types
            outcome = error
    on_end(outcome)


def _nobody(outcome: object) -> None:
    """Who is told once somebody has been told."""


class _Logged:
    """A request with its line in the log."""

    __slots__ = ("_began", "_on_answer", "_request", "pending")

    pending: Pending

    def __init__(self, request: InferRequest, on_answer: OnAnswer) -> None:
        self._began = time.monotonic()
        self._request = request
        self._on_answer = on_answer

    def end(self, outcome: InferResponse | Exception) -> None:
        """It is answered, or failed."""
        if isinstance(outcome, Exception):
            self.log(self._request.version, outcome)
        else:
            self.log(outcome.version, None)
        on_answer, self._on_answer = self._on_answer, _nobody  # else a circle is left, which only the garbage collector would end
        on_answer(outcome)

    def cancel(self) -> None:
        """The caller left."""
        self.pending.cancel()
        self.log(self._request.version, asyncio.CancelledError())

    def log(self, version: str, error: BaseException | None) -> None:
        log_request("infer", self._request.model, version, self._began, error)


class _OnStream:
    """A message on a stream: its id, what it holds of the budget, and who is told of its answer."""

    __slots__ = ("_answer", "_inference", "_reservation", "identity", "pending")

    pending: Pending

    def __init__(self, inference: GrpcInference, reservation: Reservation, answer: Callable[[bytes], None]) -> None:
        self._inference = inference
        self._reservation = reservation
        self._answer = answer
        self.identity = ""

    def end(self, outcome: InferResponse | Exception) -> None:
        """It is answered, or failed."""
        self._reservation.release()
        try:
            if isinstance(outcome, Exception):
                raise outcome
            data = protobuf.encode_stream_response(outcome, self.identity)
        except Exception as error:
            data = protobuf.encode_stream_error(self.identity, self._inference.named(error))
        self._answer(data)

    def cancel(self) -> None:
        """The stream is gone."""
        self._reservation.release()
        self.pending.cancel()
