"""A fake model for tests of applications: REST and gRPC on free ports, on threads, without the packages of services."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import unquote

import grpc
import msgspec
import numpy as np

from splitserve.api.inference import inference_pb2 as pb
from splitserve.arrays import Array, from_array, to_array
from splitserve.client import Client
from splitserve.client.answer import as_text
from splitserve.errors import Internal, NotFound, SplitserveError, Unsupported
from splitserve.oip import protobuf, rest
from splitserve.oip.messages import READY, InferRequest, InferResponse, ModelMetadata, ModelState, ServerMetadata
from splitserve.server.grpc_status import rich_status
from splitserve.signature import TensorSpec, check_inputs
from splitserve.versions import unknown_model

Answer = Mapping[str, Any] | Exception | Callable[[dict[str, Array]], Mapping[str, Any]]
"""Outputs by name; or what gives them for the inputs by name, text as ``str``; or an error to raise."""

VERSION = "1.1"
_SERVER = ServerMetadata("splitserve-fake", "0", ("binary_tensor_data",))
_N_THREADS = 64
_LENGTH = "inference-header-content-length"


class FakeClient(Client):
    """A client of a fake. ``requests`` are the inputs of each request so far, by name."""

    rest_url: str
    grpc_url: str
    requests: list[dict[str, Array]]
    """What `fake` was asked."""


@contextmanager
def fake(
    model: str | ModelMetadata,
    answer: Answer,
    *,
    inputs: Mapping[str, str] | None = None,
    labels: Mapping[str, list[str]] | None = None,
    over: Literal["rest", "grpc"] = "rest",
    **options: Any,
) -> Iterator[FakeClient]:
    """Serve a model that answers as told.

    Example::

        with splitserve.testing.fake("penguins", {"label": ["Gentoo"]}) as client:
            assert my_application(client.url).species_of(penguin) == "Gentoo"

    Args:
        model: its name; or its metadata, whose signature requests are then checked against.
        answer: the outputs, by name; a function that is called with the inputs, arrays by name, and returns them; or an error of
            `splitserve.errors` to raise.
        inputs: datatypes of columns by name, e.g. ``{"age": "FP64", "sex": "BYTES"}``, if ``model`` is a name. Without them any
            inputs are accepted, by name.
        labels: names of the columns of outputs.
        over: the protocol of the client; both are served, at ``client.rest_url`` and ``client.grpc_url``.
        options: further arguments of the client.
    """
    service = _Fake(model, answer, inputs, labels)
    with (
        _serving_rest(service) as rest_url,
        _serving_grpc(service) as grpc_url,
        FakeClient(rest_url if over == "rest" else grpc_url, **options) as client,
    ):
        client.rest_url, client.grpc_url, client.requests = rest_url, grpc_url, service.requests
        yield client


class _Fake:
    def __init__(
        self,
        model: str | ModelMetadata,
        answer: Answer,
        inputs: Mapping[str, str] | None,
        labels: Mapping[str, list[str]] | None,
    ) -> None:
        self.requests: list[dict[str, Array]] = []
        self._answer = answer
        if isinstance(model, ModelMetadata):
            self.metadata: ModelMetadata | None = model
            self.model = model.name
        else:
            self.model = model
            specs = tuple(TensorSpec(name, datatype, ("batch", 1)) for name, datatype in (inputs or {}).items())
            properties = {"labels": msgspec.json.encode(dict(labels)).decode(), "default": VERSION} if labels else {}
            self.metadata = ModelMetadata(model, (VERSION,), "fake", specs, (), properties) if specs else None

    def find(self, model: str) -> ModelMetadata:
        if model != self.model:
            raise NotFound(unknown_model(model), model=model)
        if self.metadata is None:
            raise Unsupported("this fake has no signature: give it inputs, or send arrays by name")
        return self.metadata

    def index(self) -> list[ModelState]:
        return [ModelState(self.model, VERSION, READY)]

    def infer(self, request: InferRequest) -> InferResponse:
        if request.model != self.model:
            raise NotFound(unknown_model(request.model), model=request.model)
        if self.metadata is not None:
            check_inputs(self.metadata.inputs, request.inputs, widen=True)
        arrays = {tensor.name: _text(to_array(tensor)) for tensor in request.inputs}
        self.requests.append(arrays)
        if isinstance(self._answer, Exception):
            raise self._answer
        outputs = self._answer(arrays) if callable(self._answer) else self._answer
        tensors = [from_array(name, _array(values)) for name, values in outputs.items()]
        wanted = {output.name for output in request.outputs} or outputs.keys()
        return InferResponse(
            self.model, request.version or VERSION, tuple(each for each in tensors if each.name in wanted), request.id
        )


def _text(array: Array) -> Array:
    return as_text(array) if array.dtype.kind == "O" else array


def _array(values: Any) -> Array:
    array = np.asarray(values)
    return np.asarray(values, dtype=np.object_) if array.dtype.kind in "US" else array


def _as_error(error: Exception) -> SplitserveError:
    """An error as a service renders it; the test's own function may have failed, which its author wants to read."""
    return error if isinstance(error, SplitserveError) else Internal(f"the fake's answer raised {type(error).__name__}: {error}")


@contextmanager
def _serving_rest(service: _Fake) -> Iterator[str]:
    class Handler(_RestHandler):
        fake = service

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that gives up closes its connection, which is no error."""
            if not isinstance(sys.exception(), ConnectionError):
                super().handle_error(request, client_address)

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


class _RestHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # headers and body in one write
    fake: _Fake

    def log_message(self, format: str, *arguments: Any) -> None:
        """Write no log."""

    def do_GET(self) -> None:
        self._respond(b"")

    def do_POST(self) -> None:
        self._respond(self.rfile.read(int(self.headers.get("content-length", 0))))

    def _respond(self, body: bytes) -> None:
        parts = [unquote(part) for part in self.path.partition("?")[0].strip("/").split("/")]
        headers: dict[str, str] = {}
        try:
            status, content = 200, self._answer(parts, body, headers)
        except Exception as exception:
            error = _as_error(exception)
            status = error.http_status
            content = msgspec.json.encode({"error": error.message, "reason": error.reason, **error.metadata})
        self.send_response(status)
        self.send_header("content-type", "application/octet-stream" if headers else "application/json")
        self.send_header("content-length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def _answer(self, parts: list[str], body: bytes, headers: dict[str, str]) -> bytes:
        match parts:
            case ["v2"]:
                return msgspec.json.encode(_SERVER)
            case ["v2", "health", "live" | "ready"]:
                return b'{"live":true,"ready":true}'
            case ["v2", "repository", "index"]:
                return msgspec.json.encode(self.fake.index())
            case ["v2", "models", model, *version, "ready"] if len(version) in (0, 2):
                if model != self.fake.model:
                    raise NotFound(unknown_model(model))
                return b'{"ready":true}'
            case ["v2", "models", model, *version, "infer"] if len(version) in (0, 2):
                length = self.headers.get(_LENGTH)
                request = rest.decode_request(
                    model, version[1] if version else "", body, header_length=int(length) if length else None
                )
                content, header_length = rest.encode_response(self.fake.infer(request), request)
                if header_length is not None:
                    headers[_LENGTH] = str(header_length)
                return content
            case ["v2", "models", model, *version] if len(version) in (0, 2):
                return msgspec.json.encode(rest.encode_metadata(self.fake.find(model)))
        raise Unsupported(f"the fake does not offer {self.path}")


@contextmanager
def _serving_grpc(service: _Fake) -> Iterator[str]:
    verbs: dict[str, Callable[[Any], Any]] = {
        "ServerLive": lambda _: pb.ServerLiveResponse(live=True),
        "ServerReady": lambda _: pb.ServerReadyResponse(ready=True),
        "ModelReady": lambda asked: pb.ModelReadyResponse(ready=asked.name == service.model),
        "ServerMetadata": lambda _: protobuf.encode_server_metadata(_SERVER),
        "ModelMetadata": lambda asked: protobuf.encode_metadata(service.find(asked.name)),
        "RepositoryIndex": lambda _: protobuf.encode_index(service.index()),
        "ModelInfer": lambda asked: protobuf.encode_response(service.infer(protobuf.decode_request(asked))),
    }
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            _handler(verb),
            request_deserializer=getattr(pb, f"{name}Request").FromString,
            response_serializer=getattr(pb, f"{name}Response").SerializeToString,
        )
        for name, verb in verbs.items()
    }
    with ThreadPoolExecutor(_N_THREADS, "splitserve-fake") as pool:
        server = grpc.server(pool, options=[("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)])
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(protobuf.SERVICE, handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"grpc://127.0.0.1:{port}"
        finally:
            server.stop(None).wait()


def _handler(verb: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    def handle(request: Any, context: Any) -> Any:
        try:
            return verb(request)
        except Exception as exception:
            error = _as_error(exception)
        context.set_trailing_metadata(((protobuf.DETAILS_KEY, rich_status(error)),))
        context.abort(grpc.StatusCode[error.grpc_code], error.message)
        raise AssertionError("abort raises")

    return handle
