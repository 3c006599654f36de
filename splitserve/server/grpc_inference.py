"""ModelInfer and ModelStreamInfer: the bytes of a request in, the bytes of its answer out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from splitserve.errors import SplitserveError, TooLarge
from splitserve.oip import protobuf
from splitserve.oip.messages import InferRequest, InferResponse
from splitserve.oip.pending import Pending
from splitserve.server.infer_stream import StreamPending
from splitserve.server.inference import MAX_ID_LENGTH, Inference, InferenceRules
from splitserve.telemetry.traces import BAGGAGE, TRACEPARENT, Attribute, TraceContext, received_in
from splitserve.wire.byte_budget import ByteBudget
from splitserve.wire.grpc.call import ServerCall

REQUEST_ID = "x-request-id"


def credentials(call: ServerCall) -> list[str]:
    """The values of the call's ``authorization`` metadata."""
    return [value for key, value in call.metadata if key == "authorization"]


def _id_in(value: str) -> str:
    """An id that can be logged, or ""."""
    return value if value.isprintable() and len(value) <= MAX_ID_LENGTH else ""


class GrpcInferences:
    """Begins the inferences of a gRPC face.

    Args:
        rules: what is the same for all.
        deadline: the deadline of a call with so many seconds left; None: it has none.
        named: the error for the caller.
        budget: of the bytes that messages on streams hold.
        max_message_bytes: the largest answer.
    """

    def __init__(
        self,
        rules: InferenceRules,
        *,
        deadline: Callable[[float | None], float],
        named: Callable[[Exception], SplitserveError],
        budget: ByteBudget,
        max_message_bytes: int,
    ) -> None:
        self._max_message_bytes = max_message_bytes
        self.rules = rules
        self.deadline = deadline
        self.named = named
        self.budget = budget

    def check_size(self, answer: bytes) -> bytes:
        """The answer itself.

        Raises:
            TooLarge: it exceeds the limit of a message. Where the signature shows that, it was refused before; sizes of text, for
                example, are known only now.
        """
        if len(answer) > self._max_message_bytes:
            raise TooLarge(
                f"the answer has {len(answer)} bytes, the limit is {self._max_message_bytes}; send fewer rows in a request"
            )
        return answer

    def begin(self, data: bytes, call: ServerCall, on_end: Callable[[bytes | Exception], None]) -> Pending:
        """Begin a ModelInfer.

        Raises:
            SplitserveError: the request is refused at once; ``on_end`` is not called.
        """
        inference = _UnaryInference(self, data, call, on_end)
        inference.begin()
        return inference

    def begin_on_stream(
        self, data: bytes, call: ServerCall, answer: Callable[[bytes], None], trace: TraceContext | None = None
    ) -> StreamPending | None:
        """Begin the inference of a message on a stream, where errors are messages too. Raises nothing.

        Args:
            data: the message.
            call: the stream.
            answer: sends the answer.
            trace: in the headers of the stream, for messages that have none of their own.
        """
        inference = _StreamInference(self, data, call, answer, trace)
        try:
            inference.reservation.reserve(len(data))
            inference.begin()
        except Exception as error:
            inference.identity = inference.identity or protobuf.request_id(data)
            inference.refuse(error)
            return None
        if not inference.identity:  # it is not decoded before its credentials are verified
            inference.identity = protobuf.request_id(data)
        return inference


class _GrpcInference(Inference[bytes]):
    __slots__ = ("_call", "_data", "_face")

    def __init__(self, face: GrpcInferences, data: bytes, call: ServerCall) -> None:
        super().__init__(face.rules)
        self._face = face
        self._data = data
        self._call = call

    method: ClassVar[str]

    def _credentials(self) -> Sequence[str]:
        return credentials(self._call)

    def _is_from_client(self) -> bool:
        return not any(key == protobuf.CALLER_KEY for key, _ in self._call.metadata)

    def _given_trace(self) -> TraceContext | None:
        return received_in(self._call.metadata)

    def _named_span(self, http_status: int) -> tuple[str, dict[str, Attribute]]:
        return self.method, {"rpc.system.name": "grpc", "rpc.method": self.method}

    def _parse(self) -> tuple[Any, Sequence[bytes] | None]:
        data, self._data = self._data, b""  # do not hold the bytes for as long as the request
        message, raws = protobuf.parse_request(data)
        self.model = message.model_name
        return message, raws


class _UnaryInference(_GrpcInference):
    protocol, method = "grpc", f"{protobuf.SERVICE}/ModelInfer"

    __slots__ = ("_on_end",)

    def __init__(self, face: GrpcInferences, data: bytes, call: ServerCall, on_end: Callable[[bytes | Exception], None]) -> None:
        super().__init__(face, data, call)
        self._on_end = on_end

    def _decode(self) -> InferRequest:
        (message, raws), call = self._parse(), self._call
        named, has_trace = "", False
        for key, value in call.metadata:
            if key == REQUEST_ID:
                named = named or _id_in(value)
            elif key in (TRACEPARENT, BAGGAGE):
                has_trace = True
        if named:
            self._tell_id(named)
            message.id = message.id or named
        trace = received_in(call.metadata) if has_trace else None
        request = protobuf.decode_request(message, self._face.deadline(call.time_remaining()), call.peer, raws, trace)
        return self._with_id(request)

    def _given_id(self) -> str:
        for key, value in self._call.metadata:
            if key == REQUEST_ID and (named := _id_in(value)):
                return named
        return ""

    def _tell_id(self, identity: str) -> None:
        self._call.trailing_metadata = ((REQUEST_ID, identity),)

    def _encode(self, response: InferResponse) -> bytes:
        return self._face.check_size(protobuf.response_bytes(response))

    def _deliver(self, answer: bytes) -> None:
        self._on_end(answer)

    def _fail(self, error: Exception) -> None:
        self._on_end(error)


class _StreamInference(_GrpcInference):
    """``reservation`` is what the message holds of the budget; ``identity`` is the request's id, which its error carries too."""

    protocol, method = "stream", f"{protobuf.SERVICE}/ModelStreamInfer"

    __slots__ = ("_answer", "_trace", "identity", "reservation")

    def __init__(
        self,
        face: GrpcInferences,
        data: bytes,
        call: ServerCall,
        answer: Callable[[bytes], None],
        trace: TraceContext | None,
    ) -> None:
        super().__init__(face, data, call)
        self._trace = trace
        self._answer = answer
        self.reservation = face.budget.reservation()
        self.identity = ""

    def _decode(self) -> InferRequest:
        message, raws = self._parse()
        self.identity = message.id
        deadline = self._face.deadline(protobuf.timeout_s(message))
        request = protobuf.decode_request(message, deadline, self._call.peer, raws, self._trace)
        return self._with_id(request)

    def _encode(self, response: InferResponse) -> bytes:
        return self._face.check_size(protobuf.encode_stream_response(response, self.identity))

    def _deliver(self, answer: bytes) -> None:
        self.reservation.release()
        self._answer(answer)

    def _fail(self, error: Exception) -> None:
        self._deliver(protobuf.encode_stream_error(self.identity, self._face.named(error)))

    def refuse(self, error: Exception) -> None:
        """Answer with the error that `begin` raised."""
        self._fail(error)

    def cancel(self) -> None:
        self.reservation.release()
        super().cancel()
