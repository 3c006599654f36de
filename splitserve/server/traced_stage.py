"""A stage of the fused service with a span for each of its requests: between processes, faces and clients have them."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import msgspec

from splitserve.oip.messages import InferenceService, InferRequest, InferResponse, OnAnswer
from splitserve.oip.pending import Pending, begin_task
from splitserve.telemetry.traces import Attribute, Tracing


class _TracedStage:
    """The verbs that infer; all others are the service's own."""

    def __init__(self, service: InferenceService, stage: str) -> None:
        self._service = service
        self._stage = stage

    def __getattr__(self, name: str) -> Any:
        return getattr(self._service, name)

    def begin(self, request: InferRequest, on_answer: OnAnswer) -> Pending:
        return begin_task(partial(self.infer, request), on_answer)

    async def infer(self, request: InferRequest) -> InferResponse:
        trace, tracer = request.trace, Tracing.tracer
        if trace is None or trace.span is None or tracer is None:
            return await self._service.infer(request)
        attributes: dict[str, Attribute] = {
            "splitserve.stage": self._stage,
            "splitserve.model": request.model,
            "splitserve.release": request.version,
            "splitserve.rows": request.n_rows,
            "splitserve.batch.requests": 1,
        }
        part = tracer.child(trace, "internal", f"{self._stage} {request.model}", attributes)
        with tracer.ending(part):
            return await self._service.infer(msgspec.structs.replace(request, trace=part))


def traced_stage(service: InferenceService, stage: str) -> InferenceService:
    """The service, traced."""
    return cast(InferenceService, _TracedStage(service, stage))
