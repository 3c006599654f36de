"""The client side of the protocol over REST: verbs -> requests, responses -> results.

Knows paths, headers and bodies, no HTTP library. Source: Open Inference Protocol REST; Triton's "binary tensor data" extension.
"""

from __future__ import annotations

import gzip
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

import msgspec

from splitserve.client.retries import Failed
from splitserve.client.steps import Ask, JobAsk
from splitserve.errors import (
    TABLE,
    DeadlineExceeded,
    Internal,
    InvalidInput,
    Overloaded,
    PairMismatch,
    SplitserveError,
    Unavailable,
    Unsupported,
    from_wire,
)
from splitserve.jobs.records import DeliveryState, Job, JobError, JobOptions, Status, Webhook
from splitserve.oip.messages import InferRequest, InferResponse, ModelMetadata, ModelState, Parameter, ServerMetadata
from splitserve.oip.rest import decode_json, flatten, pack_values
from splitserve.signature import TensorSpec
from splitserve.tensors import Tensor, datatype_of, n_elements
from splitserve.wire.http1.retry_after import parse_retry_after

_LENGTH_HEADER = "inference-header-content-length"
_MIN_COMPRESSED_BYTES = 1024

_BY_STATUS: dict[int, type[SplitserveError]] = {
    408: DeadlineExceeded,
    415: Unsupported,
    502: Unavailable,
    **{error.http_status: error for error in reversed(TABLE)},
    422: InvalidInput,  # of servers on FastAPI, KServe's among them; ours has a reason, which decides
    500: Internal,
}
"""The inverse of the error table, and statuses that only other servers and proxies return."""


class RestRequest(NamedTuple):
    """The parts of an HTTP request that do not depend on the connection."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


def encode(ask: Ask, *, compress: bool = False) -> RestRequest:
    """The HTTP request of a verb. ``compress``: gzip the body, from `_MIN_COMPRESSED_BYTES` on."""
    model = f"/v2/models/{quote(ask.model, safe='')}" + (f"/versions/{quote(ask.version, safe='')}" if ask.version else "")
    match ask.verb:
        case "live" | "ready":
            return RestRequest("GET", f"/v2/health/{ask.verb}", {}, b"")
        case "model_ready":
            return RestRequest("GET", f"{model}/ready", {}, b"")
        case "server_metadata":
            return RestRequest("GET", "/v2", {}, b"")
        case "model_metadata":
            return RestRequest("GET", model, {}, b"")
        case "index":
            return RestRequest("POST", "/v2/repository/index", {"content-type": "application/json"}, b"{}")
        case "load":
            path = f"/v2/repository/models/{quote(ask.model, safe='')}/load"
            return RestRequest("POST", path, {"content-type": "application/json"}, b"{}")
    if ask.job is not None and ask.request is None:
        return _job_request(ask, ask.job)
    assert ask.request is not None
    body, header_length = encode_request(ask.request)
    headers = {"content-type": "application/octet-stream", _LENGTH_HEADER: str(header_length)}
    if compress and len(body) >= _MIN_COMPRESSED_BYTES:
        body = gzip.compress(body, compresslevel=1, mtime=0)
        headers["content-encoding"] = "gzip"
    if ask.job is not None:
        headers["idempotency-key"] = ask.job.options.key
        return RestRequest("POST", f"{model}/jobs{_submit_options(ask.job.options)}", headers, body)
    return RestRequest("POST", f"{model}/infer", headers, body)


def _job_request(ask: Ask, job: JobAsk) -> RestRequest:
    path = f"/v2/jobs/{quote(job.id, safe='')}"
    match ask.verb:
        case "job":
            return RestRequest("GET", path + _query(wait=f"{job.wait_s:.3f}" if job.wait_s else ""), {}, b"")
        case "job_result":
            return RestRequest("GET", f"{path}/result", {}, b"")
        case "job_delete":
            return RestRequest("DELETE", path + _query(keep_ended="true" if job.keep_ended else ""), {}, b"")
    query = _query(model=ask.model, status=job.status, limit=str(job.limit or ""), after=job.after)
    return RestRequest("GET", f"/v2/jobs{query}", {}, b"")


def _submit_options(options: JobOptions) -> str:
    webhook = options.webhook
    return _query(
        priority=str(options.priority or ""),
        timeout=f"{options.timeout_s:.9f}" if options.timeout_s else "",
        expires=f"{options.expires_s:.9f}" if options.expires_s else "",
        webhook=webhook.url if webhook else "",
        webhook_events=",".join(webhook.events) if webhook else "",
    )


def _query(**options: str) -> str:
    """The query of a URL, of the options that are not empty."""
    given = {name: value for name, value in options.items() if value}
    return f"?{urlencode(given)}" if given else ""


def encode_request(request: InferRequest) -> tuple[bytes, int]:
    """The body of an inference request and the length of its JSON. Tensors are binary data, and so are those of the response."""
    message: dict[str, Any] = {
        "inputs": [
            {
                "name": tensor.name,
                "datatype": tensor.datatype,
                "shape": tensor.shape,
                "parameters": {"binary_data_size": len(tensor.raw)},
            }
            for tensor in request.inputs
        ],
        "parameters": {**request.parameters, "binary_data_output": True},
    }
    if request.id:
        message["id"] = request.id
    if request.outputs:
        message["outputs"] = [
            {"name": requested.name, "parameters": {**requested.parameters, "binary_data": True}} for requested in request.outputs
        ]
    head = msgspec.json.encode(message)
    return b"".join((head, *(tensor.raw for tensor in request.inputs))), len(head)


class _DecodedOutput(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    data: Any = None
    parameters: dict[str, Any] | None = None


class _DecodedAnswer(msgspec.Struct):
    outputs: list[_DecodedOutput]
    model_name: str | None = None
    model_version: str | None = None
    id: str | None = None
    parameters: dict[str, Any] | None = None


class _DecodedSpec(msgspec.Struct):
    name: str
    datatype: str
    shape: list[int]


class _DecodedMetadata(msgspec.Struct):
    name: str
    inputs: list[_DecodedSpec] = []
    outputs: list[_DecodedSpec] = []
    versions: list[str] | None = None
    platform: str = ""
    properties: dict[str, str] | None = None


class _DecodedWebhook(msgspec.Struct):
    url: str
    events: tuple[str, ...] = ()
    delivery: DeliveryState | None = None


class _DecodedJob(msgspec.Struct):
    id: str
    status: Status
    model: str
    version: str
    created: datetime
    priority: int = 0
    started: datetime | None = None
    finished: datetime | None = None
    expires: datetime | None = None
    remove_at: datetime | None = None
    attempt: int = 0
    error: dict[str, Any] | None = None
    webhook: _DecodedWebhook | None = None


class _DecodedJobs(msgspec.Struct):
    jobs: list[_DecodedJob]


_TYPES: dict[str, Any] = {
    "server_metadata": ServerMetadata,
    "model_metadata": _DecodedMetadata,
    "index": list[ModelState],
    "load": dict[str, Any],
    "submit": _DecodedJob,
    "job": _DecodedJob,
    "job_delete": _DecodedJob,
    "jobs": _DecodedJobs,
}
_DECODERS = {verb: msgspec.json.Decoder(of) for verb, of in _TYPES.items()}
_answer_decoder = msgspec.json.Decoder(_DecodedAnswer)


def decode(ask: Ask, status: int, headers: Mapping[str, str], body: bytes, url: str = "the server") -> Any:
    """The result in a response.

    Args:
        ask: what was asked.
        status: of HTTP.
        headers: names in lower case.
        body: decompressed.
        url: of the server, for messages.

    Raises:
        Failed: the error, and whether it can be retried.
    """
    if 200 <= status < 300 and _is_page(headers):
        message = (
            f"{url} answered with a web page ({headers['content-type'][:64]}), expected an Open Inference Protocol server: "
            "is this its URL, and is a login required?"
        )
        raise Failed(Unavailable(message, stage="server"))
    if ask.verb in ("live", "ready", "model_ready") and (status in (200, 400, 404, 503)):
        return status == 200
    if status != (202 if ask.verb == "submit" else 200):
        raise _failed(ask, status, headers, body, url)
    try:
        if ask.verb in ("infer", "job_result"):
            return decode_response(body, _header_length(headers, body))
        answer = decode_json(body, _DECODERS[ask.verb], "the response body")
    except InvalidInput as error:  # not the caller's fault
        raise Failed(PairMismatch(f"malformed response: {error.message}", stage="server")) from error
    match answer:
        case _DecodedMetadata():
            return _model_metadata(answer)
        case _DecodedJob():
            return _job(answer)
        case _DecodedJobs():
            return [_job(job) for job in answer.jobs]
    return answer


def _job(answer: _DecodedJob) -> Job:
    error = None
    if answer.error is not None:
        facts = {name: str(value) for name, value in answer.error.items()}
        kind = from_wire("INTERNAL", facts.get("error", ""), facts.get("reason", ""), facts)
        error = JobError.of(kind)
    return Job(
        id=answer.id,
        owner="",
        status=answer.status,
        model=answer.model,
        version=answer.version,
        priority=answer.priority,
        created=answer.created.timestamp(),
        started=answer.started.timestamp() if answer.started else 0.0,
        finished=answer.finished.timestamp() if answer.finished else 0.0,
        expires=answer.expires.timestamp() if answer.expires else 0.0,
        remove_at=answer.remove_at.timestamp() if answer.remove_at else 0.0,
        attempt=answer.attempt,
        error=error,
        webhook=Webhook(answer.webhook.url, answer.webhook.events) if answer.webhook else None,
        delivery=answer.webhook.delivery if answer.webhook else None,
    )


def _failed(ask: Ask, status: int, headers: Mapping[str, str], body: bytes, url: str) -> Failed:
    facts = _facts(body)
    kind = _BY_STATUS.get(status, InvalidInput if 400 <= status < 500 else Internal)
    message = facts.get("error") or _message(ask, status, headers, url)
    error = from_wire(kind.grpc_code, message, facts.get("reason") or kind.reason, facts)
    pause_s = parse_retry_after(headers.get("retry-after", ""), time.time())
    return Failed(error, can_retry=isinstance(error, Unavailable | Overloaded), retry_after_s=pause_s)


def _message(ask: Ask, status: int, headers: Mapping[str, str], url: str) -> str:
    """For a response that does not say itself what is wrong: of a proxy, or of a server that is none of the protocol."""
    answered = f"{url} answered with HTTP status {status}"
    if 300 <= status < 400:
        return f"{answered}, a redirect to {headers.get('location', '?')[:256]}: give that server's URL"
    if ask.model and status == 404:
        what = f'model "{ask.model}"' + (f" version {ask.version}" if ask.version else "")
        return f"{answered}: it has no {what}, or is no Open Inference Protocol server"
    software = headers.get("server", "")
    return f"{answered} ({software[:64]})" if software and _is_page(headers) else answered


def _is_page(headers: Mapping[str, str]) -> bool:
    return headers.get("content-type", "").lower().startswith("text/html")


def _facts(body: bytes) -> dict[str, str]:
    """The text fields of an error's body."""
    try:
        content = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    return {key: value for key, value in content.items() if isinstance(value, str)} if isinstance(content, dict) else {}


def _header_length(headers: Mapping[str, str], body: bytes) -> int:
    value = headers.get(_LENGTH_HEADER)
    if value is None:
        return len(body)
    if not (value.isascii() and value.isdecimal() and int(value) <= len(body)):
        raise InvalidInput(f"Inference-Header-Content-Length is {value[:32]!r}, the body has {len(body)} bytes")
    return int(value)


def decode_response(body: bytes, header_length: int) -> InferResponse:
    """The response in a body, whose tensors are JSON or binary data.

    Args:
        body: JSON, followed by the binary tensors, if any.
        header_length: bytes of the JSON.

    Raises:
        InvalidInput: the body is malformed; the message says where.
    """
    answer = decode_json(body[:header_length], _answer_decoder, "the response body")
    outputs, end = [], header_length
    for item in answer.outputs:
        size = (item.parameters or {}).get("binary_data_size")
        if size is None:
            raw = _pack_json(item)
        elif type(size) is not int or not 0 <= size <= len(body) - end:
            raise InvalidInput(f'output "{item.name}": binary_data_size is {size}, {len(body) - end} bytes remain of the body')
        else:
            raw, end = body[end : end + size], end + size
        outputs.append(Tensor(item.name, item.datatype, tuple(item.shape), raw))
    return InferResponse(
        answer.model_name or "",
        answer.model_version or "",
        tuple(outputs),
        answer.id or "",
        {key: value for key, value in (answer.parameters or {}).items() if isinstance(value, Parameter)},
    )


def _pack_json(item: _DecodedOutput) -> bytes:
    what = f'output "{item.name}"'
    values = flatten(what, item.data, item.shape)
    if len(values) != n_elements(what, item.shape):
        raise InvalidInput(f"{what}: shape {item.shape} does not match {len(values)} elements")
    return pack_values(what, datatype_of(what, item.datatype), values)


def _model_metadata(answer: _DecodedMetadata) -> ModelMetadata:
    return ModelMetadata(
        name=answer.name,
        versions=tuple(answer.versions or ()),
        platform=answer.platform,
        inputs=tuple(map(_spec, answer.inputs)),
        outputs=tuple(map(_spec, answer.outputs)),
        properties=answer.properties or {},
    )


def _spec(spec: _DecodedSpec) -> TensorSpec:
    """Variable dimensions are named by their position, as in `splitserve.oip.protobuf.decode_metadata`."""
    shape = tuple(size if size >= 0 else f"d{axis}" if axis else "batch" for axis, size in enumerate(spec.shape))
    return TensorSpec(spec.name, spec.datatype, shape)
