"""Any server of the protocol in the place of predict. Knows no transport.

Our predict has an index of its models, whose versions are numbers and never change. Other servers may have no index, and versions
that are not numbers, or none; what they serve under a name may change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import msgspec

from splitserve.catalogue import merged_index
from splitserve.errors import NotFound, PermissionDenied, Unsupported
from splitserve.oip.messages import (
    LOADING,
    READY,
    UNAVAILABLE,
    InferenceService,
    InferRequest,
    InferResponse,
    ModelMetadata,
    ModelState,
    Needed,
    OnAnswer,
)
from splitserve.oip.pending import Pending
from splitserve.versions import UNNAMED, is_number

_STATES = (READY, LOADING, UNAVAILABLE)


class OipServer(InferenceService, Protocol):
    """A server of the protocol, over gRPC."""

    async def is_ready(self, model: str, version: str = "") -> bool: ...

    async def indexes(self, needed: Needed = ()) -> list[list[ModelState]]: ...


class AnyServer:
    """An `InferenceService` in front of any server of the protocol. Versions that are not numbers are `UNNAMED`, sent as "".

    Args:
        server: the server.
        models: names of the models to ask for where there is no index.
    """

    def __init__(self, server: OipServer, *, models: Callable[[], Iterable[str]]) -> None:
        self._server = server
        self._models = models

    @property
    def is_loaded(self) -> bool:
        return self._server.is_loaded

    def begin(self, request: InferRequest, on_answer: OnAnswer) -> Pending:
        return self._server.begin(_as_sent(request), on_answer)

    async def infer(self, request: InferRequest) -> InferResponse:
        return await self._server.infer(_as_sent(request))

    async def metadata(self, model: str, version: str = "") -> ModelMetadata:
        return await self._server.metadata(model, "" if version == str(UNNAMED) else version)

    async def index(self) -> list[ModelState]:
        """All versions, or those of `models` where the server has no index or denies access to it."""
        return merged_index(await self.indexes())

    async def indexes(self, needed: Needed = ()) -> list[list[ModelState]]:
        """The same of each replica that answers. Those that are ours hold what is needed."""
        try:
            found = [merged_index([map(_plain, index)]) for index in await self._server.indexes(needed)]
            return [sorted(index, key=lambda state: state.state == READY) for index in found]
        except (Unsupported, PermissionDenied):
            return [[state for model in self._models() for state in await self._ask_for(model)]]

    async def _ask_for(self, model: str) -> list[ModelState]:
        try:
            versions = (await self._server.metadata(model)).versions
            numbered = [version for version in versions if is_number(version)]
            return [await self._state(model, version) for version in numbered or [""]]
        except NotFound:
            return []

    async def _state(self, model: str, version: str) -> ModelState:
        if await self._server.is_ready(model, version):
            return ModelState(model, version or str(UNNAMED), READY)
        return ModelState(model, version or str(UNNAMED), UNAVAILABLE, "the predict service says that it is not ready")

    async def not_ready_reason(self) -> str:
        return await self._server.not_ready_reason()

    async def load(self, model: str) -> None:
        """A server that does not support this loads by itself."""
        try:
            await self._server.load(model)
        except Unsupported:
            return

    async def unload(self, model: str) -> None:
        await self._server.unload(model)


def _as_sent(request: InferRequest) -> InferRequest:
    return msgspec.structs.replace(request, version="") if request.version == str(UNNAMED) else request


def _plain(state: ModelState) -> ModelState:
    """A version in the form of our predict. MLServer writes ``State.READY``, and has ``UNKNOWN``."""
    name = state.state.rpartition(".")[2]
    reason = state.reason if name in _STATES else state.reason or f"the predict service says {name[:32]}"
    is_served = name in (READY, LOADING)
    version = state.version if is_number(state.version) else str(UNNAMED) if is_served else ""
    return ModelState(state.name, version, name if name in _STATES else UNAVAILABLE, reason, state.properties)
