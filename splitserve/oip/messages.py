"""The Open Inference Protocol as Python objects: its messages and its verbs, without a transport.

Everything that can be inferred is an `InferenceService`: a predictor host, a preprocess stage in front of one, the proxy in
front of that, or a client of one of them over gRPC. The faces (gRPC, REST) serve any of them, so a system is split or
fused by composition.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Protocol

import msgspec

from splitserve.errors import DeadlineExceeded, InvalidInput
from splitserve.oip.pending import Pending
from splitserve.signature import TensorSpec
from splitserve.telemetry.traces import TraceContext
from splitserve.tensors import Tensor

Parameter = bool | int | float | str

NO_DEADLINE = math.inf

_EXTENSIONS = ("classification", "model_configuration", "parameters", "schedule_policy", "statistics")


def extensions(*, allow_control: bool) -> tuple[str, ...]:
    """The names of the protocol extensions that every face supports.

    Args:
        allow_control: whether clients may load and unload models.
    """
    return (*_EXTENSIONS, "model_repository") if allow_control else _EXTENSIONS


def deadline_after(timeout_s: float) -> float:
    """The point on the monotonic clock ``timeout_s`` seconds from now."""
    return time.monotonic() + timeout_s


def remaining_s(deadline: float) -> float:
    """Seconds until ``deadline``; negative when it has passed, infinite when there is none."""
    return deadline - time.monotonic()


def check_time_left(deadline: float) -> None:
    """Raises:
    DeadlineExceeded: ``deadline`` has passed.
    """
    if remaining_s(deadline) <= 0:
        raise DeadlineExceeded("deadline exceeded before the work began")


CONTROL_PARAMETERS = {"unload_dependents"}
"""Parameters of load and unload requests that clients always send; ignored, since models do not depend on each other."""

EXPECTED_MANIFEST = "splitserve_manifest_sha256"
"""Parameter of a call from preprocess to predict: the digest of the predictor's manifest that the release recorded."""

GOLDEN_REPLAY = "splitserve_golden_replay"
"""Parameter of such a call: these are golden rows, which are not counted and wait for what clients sent."""

REQUEST_ID = "splitserve_request_id"
"""Parameter of a message on a stream between stages: the request's id, for their logs. The message has one of the stream's."""

ON_BEHALF_OF = "splitserve_on_behalf_of"
"""Parameter of a job's request at the proxy: the caller that submitted it, whose rights of now count beside those of the jobs
service."""

MANIFEST_SHA256 = "manifest_sha256"
"""Property of a predictor's metadata: the digest of its manifest, by which a release names it."""

DEFAULT, RELEASE_SEQUENCE, RELEASE_DIGEST, ROW_WISE = "default", "release_sequence", "release_digest", "row_wise"
"""Properties of a pair in preprocess's metadata and index: the pair that serves requests without a version ("true" in the
index), the sequence number and the manifest's digest of its release, "false" if an answer depends on the other rows."""

TIMEOUT, PRIORITY = "timeout", "priority"


def scheduled(parameters: Mapping[str, Parameter], deadline: float) -> tuple[Mapping[str, Parameter], float]:
    """The parameters of a request without ``timeout``, and the deadline that follows from it.

    ``timeout`` is in microseconds, 0 for none, and can only shorten the deadline. ``priority`` is checked and kept.

    Args:
        parameters: of the request.
        deadline: of the request otherwise.

    Raises:
        InvalidInput: ``timeout`` or ``priority`` is negative or not an integer.

    Source: Triton's "schedule policy" extension.
    """
    if TIMEOUT not in parameters and PRIORITY not in parameters:
        return parameters, deadline
    for name in (TIMEOUT, PRIORITY):
        value = parameters.get(name, 0)
        if type(value) is not int or value < 0:
            raise InvalidInput(f'parameter "{name}": expected a non-negative integer, got {str(value)[:32]}')
    if timeout_us := int(parameters.get(TIMEOUT, 0)):
        deadline = min(deadline, deadline_after(timeout_us / 1e6))
    return {name: value for name, value in parameters.items() if name != TIMEOUT}, deadline


class RequestedOutput(msgspec.Struct, frozen=True):
    """A requested output."""

    name: str
    parameters: Mapping[str, Parameter] = {}


class InferRequest(msgspec.Struct, frozen=True):
    """One inference. ``version`` "": the service chooses; ``outputs`` (): all.

    ``caller`` identifies the caller for fair queueing, e.g. its connection; it is not sent to the next stage. Neither is
    ``is_pinned``: the caller has named the version, so that no other may answer. ``log_id``: what the logs of this and the next
    stages call a request without ``id``; it is not part of the answer. ``trace``: what it belongs to, if its caller or
    this process traces it; it goes on with the request.
    """

    model: str
    inputs: tuple[Tensor, ...]
    version: str = ""
    outputs: tuple[RequestedOutput, ...] = ()
    id: str = ""
    parameters: Mapping[str, Parameter] = {}
    deadline: float = NO_DEADLINE
    caller: Hashable = None
    is_pinned: bool = False
    trace: TraceContext | None = None
    log_id: str = ""

    @property
    def logged_id(self) -> str:
        """What logs call it; "" if it has no name."""
        return self.id or self.log_id

    @property
    def n_rows(self) -> int:
        """Rows of the first input; 0 without inputs."""
        inputs = self.inputs
        if not inputs:
            return 0
        shape = inputs[0].shape
        return shape[0] if shape else 1


class InferResponse(msgspec.Struct, frozen=True):
    """The response to one inference; ``version`` is the one that answered.

    ``phases``: gives how long its parts took in this process, in seconds; None: unknown. It is not sent.
    """

    model: str
    version: str
    outputs: tuple[Tensor, ...]
    id: str = ""
    parameters: Mapping[str, Parameter] = {}
    phases: Callable[[], Mapping[str, float]] | None = None


class ModelMetadata(msgspec.Struct, frozen=True):
    """Signature of one version of a model, and all versions that are ready."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    properties: Mapping[str, str] = {}


READY, UNAVAILABLE, LOADING = "READY", "UNAVAILABLE", "LOADING"


class ModelState(msgspec.Struct, frozen=True):
    """One version of a model in a service's index: ``state`` is READY, LOADING or UNAVAILABLE, the latter with a reason.

    A READY one has a reason where it serves although something is wrong: its repository cannot be read any more.
    """

    name: str
    version: str
    state: str
    reason: str = ""
    properties: Mapping[str, str] = {}


class ServerMetadata(msgspec.Struct, frozen=True):
    """Name and version of a server, and the protocol extensions that it supports."""

    name: str
    version: str
    extensions: tuple[str, ...] = ()


Needed = Collection[tuple[str, int]]
"""Versions by model that the caller of an index cannot do without."""

OnAnswer = Callable[[InferResponse | Exception], None]
"""Called once with the answer to a request, or with the error in its place."""


class InferenceService(Protocol):
    """The verbs of the protocol. Every method may raise a `splitserve.errors.SplitserveError`."""

    @property
    def is_loaded(self) -> bool:
        """Whether the first load has finished, successfully or not: from then on the service accepts calls."""
        ...

    def begin(self, request: InferRequest, on_answer: OnAnswer) -> Pending:
        """Begin an inference. The faces call this, so that a request that waits needs no task of its own.

        Args:
            request: its inputs are checked against the signature here.
            on_answer: called once, after this has returned and unless the request was cancelled.

        Raises:
            SplitserveError: as `infer`, where the request is refused at once; ``on_answer`` is not called.
        """
        ...

    async def infer(self, request: InferRequest) -> InferResponse:
        """As `begin`, for callers that await the answer.

        Raises:
            NotFound: no such model or version.
            Unavailable: the model or version is not ready.
            InvalidInput: the request does not fit the signature.
            DeadlineExceeded: the request's deadline passed.
        """
        ...

    async def metadata(self, model: str, version: str = "") -> ModelMetadata:
        """Raises:
        NotFound: no such model or version.
        Unavailable: the model or version is not ready.
        """
        ...

    async def index(self) -> list[ModelState]:
        """All known versions, ready or not."""
        ...

    async def not_ready_reason(self) -> str:
        """Why the service is not ready; "" if it is."""
        ...

    async def load(self, model: str) -> None:
        """Check the model repository now, and serve the model again if it was unloaded.

        Raises:
            NotFound: no such model.
        """
        ...

    async def unload(self, model: str) -> None:
        """Serve no version of the model until `load`.

        Raises:
            NotFound: no such model.
        """
        ...
