"""The REST face: Open Inference Protocol V2, V1, and the documentation of the API.

Knows HTTP; bodies are encoded by `splitserve.oip.rest` and `splitserve.oip.v1`, inferences handled by `proxy.rest.inference`.
"""

from __future__ import annotations

import re
from contextlib import suppress
from functools import lru_cache
from importlib.resources import files
from typing import Any

import msgspec

from proxy.guard import Guard
from proxy.jobs import ProxyJobs
from proxy.rest import compression
from proxy.rest.config import RestConfig
from proxy.rest.inference import (
    PathParts,
    RestInference,
    RestRules,
    V1Inference,
    compressed,
    credentials,
    may_be_compressed,
    receive,
)
from proxy.rest.jobs import PREFER, JobRoutes, check_no_job_options, prefers_async
from proxy.rest.openapi import document, with_examples
from proxy.rest.routing import REQUEST_ID, Handler, Refused, RoutedRequest, json_response, request_id_of, with_headers
from proxy.service import STAGE, ProxyService
from splitserve.errors import (
    InvalidInput,
    PermissionDenied,
    SplitserveError,
    Unauthenticated,
    Unavailable,
    Unsupported,
)
from splitserve.oip import rest, v1
from splitserve.oip.limits import check_model_name
from splitserve.oip.messages import (
    CONTROL_PARAMETERS,
    READY,
    ModelState,
    deadline_after,
)
from splitserve.oip.model_config import config_of
from splitserve.server import callers, failures
from splitserve.server.audited_calls import recorded
from splitserve.server.callers import Authenticator
from splitserve.telemetry.requests import RequestRecorder
from splitserve.versions import is_named
from splitserve.wire.http1.messages import Handled, HttpRequest, HttpResponse, Respond

MAX_EXAMPLES = 20
"""Models that the OpenAPI document has examples of."""

N_REMEMBERED_PATHS = 512
"""Size of the cache of routes by path."""

ORIGIN = b"origin"
ALLOWED = (
    "authorization, content-type, content-encoding, inference-header-content-length, request-timeout, x-request-id, prefer, "
    "idempotency-key, job-priority, job-timeout, job-expires, webhook, webhook-events, traceparent, tracestate, baggage"
)
"""Headers that a page of another origin may send. Source: Fetch, Access-Control-Allow-Headers; "*" does not include tokens."""

EXPOSED = "inference-header-content-length, retry-after, x-request-id, location"
"""Headers that it may read."""

_CHALLENGE = 'Bearer realm="splitserve"'
"""Source: RFC 6750, section 3."""


_MODEL = r"/models/(?P<model>[^/:]+)(?:/versions/(?P<version>[^/:]+))?"


class RestApp:
    """Serves a `ProxyService` over HTTP.

    Args:
        service: to serve.
        config: how to serve it.
        authenticator: None: calls are not authenticated.
        jobs: None: jobs are not supported.
        recorder: counts its inferences.
    """

    def __init__(
        self,
        service: ProxyService | Guard,
        config: RestConfig,
        *,
        authenticator: Authenticator | None = None,
        jobs: ProxyJobs | None = None,
        recorder: RequestRecorder | None = None,
    ) -> None:
        self._service = service
        self.config = config
        self._rules = RestRules(
            service=service,
            limits=config.request_limits,
            authenticator=authenticator,
            recorder=recorder,
            makes_ids=True,
            max_body_bytes=config.max_body_bytes,
            default_timeout_s=config.default_timeout_s,
            max_timeout_s=config.max_timeout_s,
            failure=self.failure,
            scheme="https" if config.tls else "http",
        )
        jobs = jobs or ProxyJobs(service, None, config.request_limits)
        self._jobs = JobRoutes(jobs, self._rules)
        self._openapi = document(config.metadata.version, requires_tokens=authenticator is not None, has_jobs=jobs.is_enabled)
        self._page = files("proxy").joinpath("docs.html").read_bytes()
        self.is_draining = False
        """While it is set, readiness is false and calls are still answered."""
        routes: tuple[tuple[str, dict[str, Handler | type[RestInference]]], ...] = (
            (rf"/v2{_MODEL}/infer", {"POST": RestInference}),
            (rf"/v1{_MODEL}:predict", {"POST": V1Inference}),
            (rf"/v1{_MODEL}:explain", {"POST": self._explain}),
            (rf"/v2{_MODEL}/jobs", {"POST": self._jobs.submit}),
            (r"/v2/jobs", {"GET": self._jobs.list_jobs}),
            (r"/v2/jobs/(?P<job>[^/]+)", {"GET": self._jobs.get, "DELETE": self._jobs.delete}),
            (r"/v2/jobs/(?P<job>[^/]+)/result", {"GET": self._jobs.result}),
            (r"/v2/health/live", {"GET": self._live}),
            (r"/v2/health/ready", {"GET": self._ready}),
            (r"/v2/models/stats", {"GET": self._all_statistics}),
            (rf"/v2{_MODEL}", {"GET": self._model_metadata}),
            (rf"/v2{_MODEL}/config", {"GET": self._model_config}),
            (rf"/v2{_MODEL}/stats", {"GET": self._model_statistics}),
            (rf"/v2{_MODEL}/ready", {"GET": self._model_ready}),
            (r"/v2/?", {"GET": self._server_metadata}),
            (r"/v2/models", {"GET": self._models}),
            (r"/v2/repository/index", {"POST": self._repository_index}),
            (r"/v2/repository/models/(?P<model>[^/:]+)/(?P<action>load|unload)", {"POST": self._repository_control}),
            (r"/v1/models", {"GET": self._models}),
            (rf"/v1{_MODEL}", {"GET": self._model_status}),
            (rf"/v1{_MODEL}/metadata", {"GET": self._v1_metadata}),
            (r"/openapi\.json", {"GET": self._openapi_document}),
            (r"/docs", {"GET": self._docs_page}),
            (r"/", {"GET": self._alive}),
        )
        self._open: tuple[Handler, ...] = (
            self._live, self._ready, self._server_metadata, self._openapi_document, self._docs_page, self._alive,
        )  # fmt: skip
        self._routes = [(re.compile(pattern), methods) for pattern, methods in routes]
        self._route = lru_cache(N_REMEMBERED_PATHS)(self._find_route)

    def answer(self, incoming: HttpRequest, respond: Respond) -> Handled:
        """Begin to answer."""
        if REQUEST_ID in incoming.headers or ORIGIN in incoming.headers:
            extra = self._extra_headers(incoming)
            if extra is None:
                return HttpResponse(204, b"", headers=self._preflight_headers(incoming))
            if extra:
                return with_headers(extra, lambda responding: self._begin(incoming, responding), respond)
        return self._begin(incoming, respond)

    def _extra_headers(self, incoming: HttpRequest) -> tuple[tuple[str, str], ...] | None:
        """Of every response to this request: its id, and what lets a page of another origin read it; None: a preflight."""
        extra: tuple[tuple[str, str], ...] = ()
        if ORIGIN in incoming.headers and (origin := self._allowed_origin(incoming)):
            if incoming.method == "OPTIONS" and b"access-control-request-method" in incoming.headers:
                return None
            extra += (("access-control-allow-origin", origin), ("access-control-expose-headers", EXPOSED), ("vary", "origin"))
        if (request_id := request_id_of(incoming)) is not None:
            extra += (("x-request-id", request_id),)
        return extra

    def _allowed_origin(self, incoming: HttpRequest) -> str:
        """The origin of the page that sends a request, if it is allowed; else ""."""
        origin = incoming.header(ORIGIN) or ""
        allowed = self.config.cors_origins
        return origin if origin in allowed else "*" if "*" in allowed else ""

    def _preflight_headers(self, incoming: HttpRequest) -> tuple[tuple[str, str], ...]:
        """Source: Fetch, "CORS-preflight request". Browsers ask before they send JSON or a token."""
        return (
            ("access-control-allow-origin", self._allowed_origin(incoming)),
            ("access-control-allow-methods", "GET, POST, DELETE"),
            ("access-control-allow-headers", ALLOWED),
            ("access-control-max-age", "600"),
            ("vary", "origin, access-control-request-method, access-control-request-headers"),
        )

    def _begin(self, incoming: HttpRequest, respond: Respond) -> Handled:
        try:
            handler, path = self._route(incoming.method, incoming.path)
        except Refused as refused:
            return _refusal(refused)
        headers = incoming.headers
        is_plain = headers.get(b"content-type") == b"application/json" and b"content-encoding" not in headers
        try:
            encoding = "" if is_plain else _body_encoding(incoming)
        except Refused as refused:
            return self._refused(handler, path, incoming, refused, respond) if isinstance(handler, type) else _refusal(refused)
        if not isinstance(handler, type):
            return self._answer(handler, path, incoming, encoding)
        if PREFER in incoming.headers and prefers_async(incoming):
            return self._answer(self._jobs.submitting(handler), path, incoming, encoding)
        inference: RestInference | None = None
        try:
            if b"?" in incoming.target:
                check_no_job_options(incoming)
            inference = handler(self._rules, path, incoming, encoding, respond)
            inference.begin()
        except Exception as error:
            return self._refused(handler, path, incoming, error, respond) if inference is None else inference.failure(error)
        return inference

    def _refused(
        self, kind: type[RestInference], path: PathParts, incoming: HttpRequest, error: Exception, respond: Respond
    ) -> HttpResponse:
        """The response to an inference whose headers or URL are refused, which is counted and logged as those whose body is."""
        inference = kind(self._rules, path, incoming, "", respond, timeout_s=self._rules.default_timeout_s)
        inference.refuse(InvalidInput(str(error)) if isinstance(error, Refused) else error)
        return inference.failure(error)

    async def _answer(self, handler: Handler, path: PathParts, incoming: HttpRequest, encoding: str) -> HttpResponse:
        try:
            if handler == self._repository_control:
                with recorded(
                    path["action"],
                    source=incoming.address(),
                    model=lambda: path["model"],
                    protocol="rest",
                    forwarded_for=incoming.header(b"x-forwarded-for"),
                ):
                    return await self._answered(handler, path, incoming, encoding)
            return await self._answered(handler, path, incoming, encoding)
        except Exception as error:
            return self.failure(error)

    async def _answered(self, handler: Handler, path: PathParts, incoming: HttpRequest, encoding: str) -> HttpResponse:
        deadline = deadline_after(self._rules.timeout_s(incoming))
        await callers.identify(self._rules.authenticator, credentials(incoming), is_open=handler in self._open)
        body = await receive(incoming, encoding, self.config.max_body_bytes)
        response = await handler(RoutedRequest(path, incoming, body, deadline))
        if may_be_compressed(response, incoming):
            response = await compressed(response, incoming)
        return response

    def failure(self, error: Exception) -> HttpResponse:
        """The response for an error; the only place that renders one."""
        if isinstance(error, Refused):
            return _refusal(error)
        return _error(failures.named(error, STAGE), self.config.retry_after_s)

    def _find_route(self, method: str, path: str) -> tuple[Handler | type[RestInference], dict[str, str]]:
        for pattern, methods in self._routes:
            if match := pattern.fullmatch(path):
                handler = methods.get("GET" if method == "HEAD" else method)
                if handler is None:
                    allowed = ", ".join(methods) + (", HEAD" if "GET" in methods else "")
                    raise Refused(405, f"{method[:16]} is not allowed for this path", (("allow", allowed),))
                return handler, {name: value or "" for name, value in match.groupdict().items()}
        raise Refused(404, "Not Found")

    async def _explain(self, request: RoutedRequest) -> HttpResponse:
        raise Unsupported("explanations are not supported")

    async def _live(self, request: RoutedRequest) -> HttpResponse:
        return json_response(200, {"live": True})

    async def _ready(self, request: RoutedRequest) -> HttpResponse:
        if reason := "draining" if self.is_draining else await self._service.not_ready_reason():
            raise Unavailable(reason)
        return json_response(200, {"ready": True, "live": True})

    async def _server_metadata(self, request: RoutedRequest) -> HttpResponse:
        return json_response(200, self.config.metadata)

    async def _models(self, request: RoutedRequest) -> HttpResponse:
        return json_response(200, {"models": sorted({state.name for state in await self._service.index()})})

    async def _model_metadata(self, request: RoutedRequest) -> HttpResponse:
        metadata = await self._service.metadata(request.path["model"], request.path["version"])
        return json_response(200, rest.encode_metadata(metadata))

    async def _model_ready(self, request: RoutedRequest) -> HttpResponse:
        model, version = request.path["model"], request.path["version"]
        self._service.choose(model, version)  # raises if there is none
        states = [state for state in await self._service.index() if state.name == model and is_named(state.version, version)]
        if not any(state.state == READY for state in states):
            reasons = "; ".join(f"{state.version}: {state.reason}" for state in states)
            raise Unavailable(f'model "{model}" is not ready: {reasons}', model=model, pair=version)
        return json_response(200, {"name": model, "ready": True})

    async def _model_status(self, request: RoutedRequest) -> HttpResponse:
        """In a form that KServe's and TensorFlow Serving's clients both read."""
        model, version = request.path["model"], request.path["version"]
        ready = await self._model_ready(request)
        states = [state for state in await self._service.index() if state.name == model and is_named(state.version, version)]
        return json_response(200, {**msgspec.json.decode(ready.body), **v1.status_of(states)})

    async def _v1_metadata(self, request: RoutedRequest) -> HttpResponse:
        """In TensorFlow Serving's form."""
        pair, metadata = self._service.choose(request.path["model"], request.path["version"])
        return json_response(200, v1.metadata_of(metadata, str(pair)))

    async def _model_config(self, request: RoutedRequest) -> HttpResponse:
        return json_response(200, config_of(await self._service.metadata(request.path["model"], request.path["version"])))

    async def _model_statistics(self, request: RoutedRequest) -> HttpResponse:
        model, version = request.path["model"], request.path["version"]
        return json_response(200, {"model_stats": self._service.statistics.report(await self._service.index(), model, version)})

    async def _all_statistics(self, request: RoutedRequest) -> HttpResponse:
        return json_response(200, {"model_stats": self._service.statistics.report(await self._service.index())})

    async def _repository_index(self, request: RoutedRequest) -> HttpResponse:
        options = rest.decode_json(request.body) if request.body else {}
        only_ready = isinstance(options, dict) and options.get("ready") is True
        states = [state for state in await self._service.index() if state.state == READY or not only_ready]
        return json_response(200, [_state(state) for state in states])

    async def _repository_control(self, request: RoutedRequest) -> HttpResponse:
        if not self.config.allow_control:
            raise PermissionDenied("loading and unloading is disabled; ALLOW_REPOSITORY_CONTROL=true enables it")
        if b"origin" in request.incoming.headers:
            # A web page in a browser, which may be inside a network that its author cannot reach.
            raise PermissionDenied("loading and unloading is not allowed for web pages")
        check_model_name(request.path["model"])
        options = rest.decode_json(request.body) if request.body else {}
        parameters = options.get("parameters", {}) if isinstance(options, dict) else None
        if not isinstance(parameters, dict) or parameters.keys() - CONTROL_PARAMETERS:
            raise InvalidInput("parameters are not supported: the model repository determines what is loaded")
        act = self._service.load if request.path["action"] == "load" else self._service.unload
        await act(request.path["model"])
        return json_response(200, {})

    async def _openapi_document(self, request: RoutedRequest) -> HttpResponse:
        if self._rules.authenticator is not None:  # the document is for everyone, the names of models are not
            return json_response(200, self._openapi)
        names = sorted({state.name for state in await self._service.index() if state.state == READY})[:MAX_EXAMPLES]
        models = []
        for name in names:
            with suppress(SplitserveError):  # it is gone
                models.append(await self._service.metadata(name))
        return json_response(200, with_examples(self._openapi, models))

    async def _docs_page(self, request: RoutedRequest) -> HttpResponse:
        return HttpResponse(200, self._page, "text/html; charset=utf-8")

    async def _alive(self, request: RoutedRequest) -> HttpResponse:
        return json_response(200, {"status": "alive"})


def _body_encoding(incoming: HttpRequest) -> str:
    """The encoding of the body; "" if it has none. Every other content type is accepted.

    Raises:
        Refused: the media type or encoding of the body is not supported.
    """
    headers = incoming.headers
    if b"content-type" in headers and headers[b"content-type"].startswith(b"multipart/"):
        raise Refused(415, "multipart bodies are not supported: send JSON")
    if b"content-encoding" not in headers:
        return ""
    encoding = (incoming.header(b"content-encoding") or "").lower()
    if encoding == "identity":
        return ""
    if encoding not in compression.ENCODINGS:
        supported = ", ".join(compression.ENCODINGS)
        raise Refused(415, f"content-encoding: expected {supported}, got {encoding[:32]}", (("accept-encoding", supported),))
    return encoding


def _refusal(refused: Refused) -> HttpResponse:
    return json_response(refused.status, {"error": str(refused)}, refused.headers)


def _state(state: ModelState) -> dict[str, Any]:
    """An entry of the index, with the facts of its release if they are known."""
    entry: dict[str, Any] = {"name": state.name, "version": state.version, "state": state.state, "reason": state.reason}
    return {**entry, "properties": dict(state.properties)} if state.properties else entry


def _error(error: SplitserveError, retry_after_s: int) -> HttpResponse:
    headers: tuple[tuple[str, str], ...] = ()
    if error.is_retryable:
        headers = (("retry-after", str(retry_after_s)),)
    elif isinstance(error, Unauthenticated):
        headers = (("www-authenticate", _CHALLENGE),)
    elif isinstance(error, PermissionDenied):
        headers = (("www-authenticate", f'{_CHALLENGE}, error="insufficient_scope"'),)
    return json_response(error.http_status, {"error": error.message, "reason": error.reason, **error.metadata}, headers)
