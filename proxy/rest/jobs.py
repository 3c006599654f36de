"""Jobs over REST: submit, get, wait, fetch the result, cancel, list. Source: RFC 7240, "Prefer"; draft "Idempotency-Key"."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable
from typing import TypeVar
from urllib.parse import parse_qsl, urlsplit

import msgspec

from proxy.jobs import UNBOUND, ProxyJobs, Rendering, fingerprint
from proxy.rest.inference import (
    HEADER_LENGTH,
    TIMEOUT,
    RestInference,
    RestRules,
    V1Inference,
    http_span,
    route_of,
    trace_of,
    v1_response,
    v2_response,
)
from proxy.rest.routing import Handler, RoutedRequest, json_response
from splitserve.api.inference import inference_pb2
from splitserve.errors import DeadlineExceeded, InvalidInput
from splitserve.jobs import events
from splitserve.jobs.records import Job, JobOptions, webhook_to
from splitserve.jobs.service import DEFAULT_LISTED, MAX_LISTED, STAGE
from splitserve.oip import protobuf
from splitserve.oip.messages import InferRequest, remaining_s
from splitserve.telemetry.traces import TraceContext, submitting
from splitserve.wire.http1.messages import HttpRequest, HttpResponse

PREFER, KEY = b"prefer", b"idempotency-key"
RETRY_AFTER_S = 1
UNKNOWN_WHETHER_STORED = ": it is unknown whether the job was stored; send an Idempotency-Key to submit again without a duplicate"
WAITING_SHARE = 0.9
"""Of the time of a call that waits for the end of a job; the rest is for its answer."""
_ASYNC = "respond-async"
_NUMBER = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")
_SUBMIT_OPTIONS = frozenset({"priority", "timeout", "expires", "webhook", "webhook_events"})
_LIST_OPTIONS = frozenset({"model", "status", "limit", "after"})
_decode_rendering = msgspec.json.Decoder(Rendering).decode

T = TypeVar("T")


def prefers_async(incoming: HttpRequest) -> bool:
    """Whether the request asks for a job. Source: RFC 7240, section 4.1."""
    preferences = (incoming.header(PREFER) or "").split(",")
    return any(preference.partition(";")[0].strip().lower() == _ASYNC for preference in preferences)


def check_no_job_options(incoming: HttpRequest) -> None:
    """For an inference that is answered at once; parameters that are not those of jobs are ignored, as the protocol does.

    Raises:
        InvalidInput: it has parameters of a job.
    """
    if options := _SUBMIT_OPTIONS & dict(_pairs(incoming)).keys():
        raise InvalidInput(f'the URL\'s parameter "{min(options)}" is for jobs: send the header "Prefer: {_ASYNC}" too')


class JobRoutes:
    """The handlers.

    Args:
        jobs: the verbs.
        rules: of inferences: bodies of jobs are decoded as theirs.
    """

    def __init__(self, jobs: ProxyJobs, rules: RestRules) -> None:
        self._jobs = jobs
        self._rules = rules
        self.submit: Handler = self._submitting(RestInference, "")
        self._preferred = {kind: self._submitting(kind, _ASYNC) for kind in (RestInference, V1Inference)}

    def submitting(self, kind: type[RestInference]) -> Handler:
        """The handler of an inference that prefers to be a job."""
        return self._preferred[kind]

    def _submitting(self, kind: type[RestInference], preference: str) -> Handler:
        async def submit(request: RoutedRequest) -> HttpResponse:
            self._jobs.check_enabled()
            incoming, model = request.incoming, request.path["model"]
            name, attributes = http_span(incoming, route_of(incoming.path, model), 0, self._rules.scheme)
            with submitting(trace_of(incoming), name, {**attributes, "splitserve.model": model[:128]}) as trace:
                return await submit_traced(request, trace)

        async def submit_traced(request: RoutedRequest, trace: TraceContext | None) -> HttpResponse:
            inference = kind(self._rules, request.path, request.incoming, "", lambda _: None)
            options = _options(request, api="v1" if kind is V1Inference else "v2")
            try:
                decoded = msgspec.structs.replace(inference.decode_body(request.body), trace=trace)
                bound = self._jobs.bind(decoded)
            except UNBOUND as refusal:
                submitting = self._jobs.submitted_before(options, refusal)
            else:
                submitting = self._jobs.submit(bound, _rendering(inference, decoded), options)
            submitted = await _in_time(submitting, request, UNKNOWN_WHETHER_STORED)
            headers = [("location", _path(submitted.job)), ("retry-after", str(RETRY_AFTER_S))]
            if preference:
                headers.append(("preference-applied", preference))
            return json_response(202, events.job_json(submitted.job), tuple(headers))

        return submit

    async def get(self, request: RoutedRequest) -> HttpResponse:
        """``GET /v2/jobs/JOB?wait=SECONDS``"""
        wait_s = _number("wait", _query(request, frozenset({"wait"})).get("wait", "0"))
        if TIMEOUT in request.incoming.headers:
            wait_s = min(wait_s, WAITING_SHARE * remaining_s(request.deadline))
        job = await self._jobs.get(request.path["job"], wait_s)
        return json_response(200, events.job_json(job), () if job.is_finished else (("retry-after", str(RETRY_AFTER_S)),))

    async def result(self, request: RoutedRequest) -> HttpResponse:
        """``GET /v2/jobs/JOB/result``: the body that the inference would have had."""
        result = await _in_time(self._jobs.result(request.path["job"]), request)
        rendering = _decode_rendering(result.rendering)
        response = protobuf.decode_response(protobuf.parse(inference_pb2.ModelInferResponse, result.answer))
        if rendering.api == "v1":
            return v1_response(response, is_columnar=rendering.is_columnar)
        return v2_response(response, rendering.request(response.model))

    async def delete(self, request: RoutedRequest) -> HttpResponse:
        """``DELETE /v2/jobs/JOB?keep_ended=true``"""
        keep = _query(request, frozenset({"keep_ended"})).get("keep_ended", "false")
        if keep not in ("true", "false"):
            raise InvalidInput(f'keep_ended: expected true or false, got "{keep[:32]}"')
        job = await _in_time(self._jobs.delete(request.path["job"], keep_ended=keep == "true"), request)
        return json_response(200, events.job_json(job))

    async def list_jobs(self, request: RoutedRequest) -> HttpResponse:
        """``GET /v2/jobs?model=&status=&limit=&after=``"""
        options = _query(request, _LIST_OPTIONS)
        limit = options.get("limit", str(DEFAULT_LISTED))
        if not (limit.isascii() and limit.isdecimal() and 0 < int(limit[:9]) <= MAX_LISTED and len(limit) < 10):
            raise InvalidInput(f'limit: expected 1 to {MAX_LISTED}, got "{limit[:32]}"')
        listing = self._jobs.list_jobs(
            model=options.get("model", ""),
            status=options.get("status", ""),
            limit=int(limit),
            after=options.get("after", ""),
        )
        return json_response(200, {"jobs": [events.job_json(job) for job in await _in_time(listing, request)]})


async def _in_time(call: Awaitable[T], request: RoutedRequest, advice: str = "") -> T:
    """The answer of the jobs service, within what ``Request-Timeout`` allows.

    Raises:
        DeadlineExceeded: it did not answer in time.
    """
    try:  # deadlines are on the clock of the event loop, asyncio's and uvloop's
        async with asyncio.timeout_at(request.deadline):
            return await call
    except TimeoutError:
        raise DeadlineExceeded(f"the jobs service did not answer in time{advice}", stage=STAGE) from None


def _rendering(inference: RestInference, request: InferRequest) -> Rendering:
    if isinstance(inference, V1Inference):
        return Rendering(api="v1", is_columnar=inference.is_columnar)
    return Rendering.of(request)


def _path(job: Job) -> str:
    return f"/v2/jobs/{job.id}"


def _query(request: RoutedRequest, known: frozenset[str]) -> dict[str, str]:
    """The parameters of the URL.

    Raises:
        InvalidInput: one is unknown, or there twice.
    """
    pairs = _pairs(request.incoming)
    options = dict(pairs)
    if unknown := options.keys() - known:
        raise InvalidInput(f'the URL\'s parameter "{min(unknown)[:32]}" is unknown, expected some of {", ".join(sorted(known))}')
    if len(options) < len(pairs):
        raise InvalidInput("the URL has a parameter twice")
    return options


def _pairs(incoming: HttpRequest) -> list[tuple[str, str]]:
    return parse_qsl(urlsplit(incoming.target.decode("latin-1")).query, keep_blank_values=True)


def _number(name: str, text: str) -> float:
    if not _NUMBER.fullmatch(text):
        raise InvalidInput(f'{name}: expected a number of seconds, got "{text[:32]}"')
    return float(text)


def _period(name: str, options: dict[str, str]) -> float:
    """The seconds of an option; 0 if it is not there."""
    if name not in options:
        return 0.0
    seconds = _number(name, options[name])
    if not seconds > 0:
        raise InvalidInput(f"{name}: expected more than 0 seconds, got {options[name]}")
    return seconds


def _options(request: RoutedRequest, *, api: str) -> JobOptions:
    """What the URL says of the job. A parameter without a value is refused: whoever sends it believes that it says something."""
    options = _query(request, _SUBMIT_OPTIONS)
    priority = options.get("priority", "")
    if "priority" in options and priority not in set("123456789"):
        raise InvalidInput(f'priority: expected a number from 1 to 9, got "{priority[:32]}"')
    names = options["webhook_events"].split(",") if "webhook_events" in options else ()
    if not options.get("webhook") and options.keys() & {"webhook", "webhook_events"}:
        raise InvalidInput("webhook: expected an https URL, got none")
    key = _key(request.incoming)
    return JobOptions(
        key=key,
        fingerprint=_fingerprint(request, api, options) if key else b"",
        priority=int(priority or 0),
        timeout_s=_period("timeout", options),
        expires_s=_period("expires", options),
        webhook=webhook_to(options["webhook"], names) if "webhook" in options else None,
    )


def _key(incoming: HttpRequest) -> str:
    """The idempotency key: a string of RFC 8941, or the bare text that most clients send."""
    value = (incoming.header(KEY) or "").strip()
    if len(value) >= 2 and value[0] == value[-1] == '"':
        value = value[1:-1].replace('\\"', '"').replace("\\\\", "\\")
    if KEY in incoming.headers and not value:
        raise InvalidInput("Idempotency-Key: expected a key, got none")
    return value


def _fingerprint(request: RoutedRequest, api: str, options: dict[str, str]) -> bytes:
    """Of all that gives the request its meaning; the way to ask for a job (path or Prefer) and compression are no part of it."""
    return fingerprint(
        [
            b"rest",
            api.encode(),
            request.path["model"].encode(),
            request.path["version"].encode(),
            msgspec.json.encode(sorted(options.items())),
            request.incoming.headers.get(HEADER_LENGTH, b""),
            request.body,
        ]
    )
