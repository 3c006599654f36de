"""Authorization: an `InferenceService` in front of the proxy's, so that both faces and every verb are checked in one place.

A verb that is not listed here is allowed to operators only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from splitserve.errors import PermissionDenied, Unauthenticated
from splitserve.oip.messages import ON_BEHALF_OF, InferRequest, InferResponse, ModelMetadata, ModelState, OnAnswer
from splitserve.oip.pending import Pending
from splitserve.oip.permission import is_permitted, not_permitted
from splitserve.server.callers import NOBODY, Caller, current
from splitserve.versions import Pair

if TYPE_CHECKING:
    from proxy.service import ProxyService

NO_CREDENTIALS = "credentials are required: Authorization: Bearer TOKEN"


def _authenticated_caller() -> Caller:
    caller = current.get()
    if caller is None or caller is NOBODY:
        raise Unauthenticated(NO_CREDENTIALS)
    return caller


def check_model(model: str) -> None:
    """Raises:
    Unauthenticated, PermissionDenied: the caller may not call the model.
    """
    if not _authenticated_caller().may_call(model):
        raise not_permitted(model)


def _check_operator() -> None:
    if not _authenticated_caller().is_operator:
        raise PermissionDenied("this call requires an operator's credentials")


class Guard:
    """The proxy's service, for callers that are allowed to use it.

    Args:
        service: of the proxy.
        models_of: the models that a caller may call now, by its name; None: that is not known here.
    """

    def __init__(self, service: ProxyService, models_of: Callable[[str], Sequence[str] | None] = lambda _: None) -> None:
        self._service = service
        self._models_of = models_of

    def _checked(self, request: InferRequest) -> InferRequest:
        """The request, if its caller may call the model, and who submitted it may, if it is a job."""
        check_model(request.model)
        return self._checked_submitter(request)

    def _checked_submitter(self, request: InferRequest) -> InferRequest:
        if ON_BEHALF_OF not in request.parameters:
            return request
        models = self._models_of(str(request.parameters[ON_BEHALF_OF]))
        if models is not None and not is_permitted(models, request.model):
            raise not_permitted(request.model, any_more=True)
        parameters = {name: value for name, value in request.parameters.items() if name != ON_BEHALF_OF}
        return msgspec.structs.replace(request, parameters=parameters)

    @property
    def is_loaded(self) -> bool:
        return self._service.is_loaded

    def begin(self, request: InferRequest, on_answer: OnAnswer) -> Pending:
        return self._service.begin(self._checked(request), on_answer)

    async def infer(self, request: InferRequest) -> InferResponse:
        return await self._service.infer(self._checked(request))

    def bind(self, request: InferRequest) -> InferRequest:
        """As `ProxyService.bind`."""
        check_model(request.model)
        return self._service.bind(request)

    def choose(self, model: str, version: str) -> tuple[Pair, ModelMetadata]:
        """As `ProxyService.choose`."""
        check_model(model)
        return self._service.choose(model, version)

    async def metadata(self, model: str, version: str = "") -> ModelMetadata:
        check_model(model)
        return await self._service.metadata(model, version)

    async def index(self) -> list[ModelState]:
        """The models that the caller may call."""
        caller = _authenticated_caller()
        return [state for state in await self._service.index() if caller.is_operator or caller.may_call(state.name)]

    async def load(self, model: str) -> None:
        _check_operator()
        await self._service.load(model)

    async def unload(self, model: str) -> None:
        _check_operator()
        await self._service.unload(model)

    async def not_ready_reason(self) -> str:
        """Allowed without credentials, but then without the reason, which names models."""
        reason = await self._service.not_ready_reason()
        return "not ready" if reason and current.get() is NOBODY else reason

    def __getattr__(self, name: str) -> Any:
        _check_operator()
        return getattr(self._service, name)


class JobsGuard(Guard):
    """For jobs that run in the proxy's process: calls carry no credentials; who submitted a job must still be permitted."""

    def _checked(self, request: InferRequest) -> InferRequest:
        return self._checked_submitter(request)

    async def metadata(self, model: str, version: str = "") -> ModelMetadata:
        return await self._service.metadata(model, version)
