"""A fake service, and a gRPC server for any service on a free port. Needs the extra server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from splitserve import testing
from splitserve.catalogue import why_not_ready
from splitserve.errors import NotFound
from splitserve.oip.messages import (
    READY,
    InferRequest,
    InferResponse,
    ModelMetadata,
    ModelState,
    Needed,
    OnAnswer,
    ServerMetadata,
)
from splitserve.oip.pending import Pending, begin_task
from splitserve.server.grpc_config import GrpcConfig
from splitserve.server.grpc_face import GrpcFace
from splitserve.signature import TensorSpec
from splitserve.versions import unknown_model


class FakeInference:
    """An `InferenceService` with one version for each signature it is given.

    Args:
        signatures: what is served, each metadata's first version being the one it describes.
        answer: called with every request, which is recorded in `requests`; by default the outputs are the inputs.
    """

    def __init__(
        self, *signatures: ModelMetadata, answer: Callable[[InferRequest], InferResponse] | None = None, not_ready: str = ""
    ) -> None:
        self.signatures = {(each.name, each.versions[0]): each for each in signatures}
        self.states = [ModelState(name, version, READY) for name, version in self.signatures]
        self.requests: list[InferRequest] = []
        self.controlled: list[tuple[str, str]] = []
        self.needed: list[tuple[str, int]] = []
        self.not_ready = not_ready
        self.is_loaded = True
        self._answer = answer or _echo

    def begin(self, request: InferRequest, on_answer: OnAnswer) -> Pending:
        """As `infer`, in a task, so that a test overrides `infer` only."""
        return begin_task(partial(self.infer, request), on_answer)

    async def infer(self, request: InferRequest) -> InferResponse:
        """Record the request and return the answer."""
        self.requests.append(request)
        return self._answer(request)

    async def metadata(self, model: str, version: str = "") -> ModelMetadata:
        """The signature it was given."""
        for (name, number), signature in self.signatures.items():
            if name == model and version in ("", number):
                return signature
        raise NotFound(unknown_model(model))

    async def index(self) -> list[ModelState]:
        """`states`, which a test may change."""
        return list(self.states)

    async def indexes(self, needed: Needed = ()) -> list[list[ModelState]]:
        """`index`, as of the only replica."""
        return [await self.index()]

    async def load(self, model: str) -> None:
        """Record it in `controlled`."""
        self.controlled.append(("load", model))

    async def unload(self, model: str) -> None:
        """Record it in `controlled`."""
        self.controlled.append(("unload", model))

    async def not_ready_reason(self) -> str:
        """`not_ready`, which a test may change."""
        return self.not_ready or why_not_ready(self.states)


def _echo(request: InferRequest) -> InferResponse:
    return InferResponse(request.model, request.version or "1", request.inputs, request.id)


def signature(
    name: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec] = (), *, version: str = "1"
) -> ModelMetadata:
    """Metadata of a version; the outputs are the inputs unless they are given."""
    return ModelMetadata(name, (version,), "test", tuple(inputs), tuple(outputs or inputs))


@asynccontextmanager
async def serving(service: FakeInference, *, stage: str = "predict", **options: Any) -> AsyncIterator[str]:
    """Serve over gRPC on a free port of loopback.

    Args:
        service: what is served.
        stage: the name that errors carry.
        options: fields of `GrpcConfig`.

    Yields:
        The address, ``127.0.0.1:port``.
    """
    config = GrpcConfig(stage=stage, metadata=ServerMetadata("test", "0"), **{"engine": testing.ENGINE, **options})
    async with GrpcFace(service, config, on_needed=service.needed.extend) as face:
        yield f"127.0.0.1:{face.port}"
