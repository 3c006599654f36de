"""The REST face over a service that echoes: paths, methods, statuses, headers, bodies."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
import pytest

from proxy.rest.app import RestApp
from proxy.rest.config import RestConfig
from proxy.rest.server import RestFace
from proxy.service import ProxyService
from splitserve.errors import NotFound, Overloaded, PairMismatch
from splitserve.oip.messages import (
    DEFAULT,
    READY,
    RELEASE_SEQUENCE,
    InferRequest,
    InferResponse,
    ModelState,
    ServerMetadata,
)
from splitserve.signature import TensorSpec
from splitserve.tensors import Tensor
from splitserve.testing import FakeInference, signature

LIMIT = 10_000
ROW = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 2.5]}


@pytest.fixture
def backend() -> FakeInference:
    return FakeInference(signature("echo", [TensorSpec("x", "FP32", ("batch", 2))], version="1.1"))


@pytest.fixture
async def app(backend: FakeInference) -> RestApp:
    service = ProxyService(backend)
    await service.refresh()
    metadata = ServerMetadata("splitserve", "0", ("binary_tensor_data",))
    return RestApp(service, RestConfig(metadata=metadata, max_body_bytes=LIMIT, default_timeout_s=30, grace_s=1))


@pytest.fixture
async def client(app: RestApp) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(app) as client:
        yield client


@asynccontextmanager
async def client_of(app: RestApp) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the face, over a socket."""
    async with (
        RestFace(app) as face,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{face.port}", trust_env=False, verify=False) as client,
    ):
        yield client


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("/", {"status": "alive"}),
        ("/v2/health/live", {"live": True}),
        ("/v2/health/ready", {"ready": True, "live": True}),
        ("/v2", {"name": "splitserve", "version": "0", "extensions": ["binary_tensor_data"]}),
        ("/v2/", {"name": "splitserve", "version": "0", "extensions": ["binary_tensor_data"]}),
        ("/v2/models", {"models": ["echo"]}),
        ("/v1/models", {"models": ["echo"]}),
        ("/v2/models/echo/ready", {"name": "echo", "ready": True}),
        ("/v2/models/echo/versions/1.1/ready?why=not", {"name": "echo", "ready": True}),
        (
            "/v1/models/echo",
            {
                "name": "echo",
                "ready": True,
                "model_version_status": [
                    {"version": "1.1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
                ],
            },
        ),
    ],
)
async def test_every_get_route_is_answered(client: httpx.AsyncClient, path: str, content: Any) -> None:
    """Every path of the protocol is served; a query string is ignored."""
    answer = await client.get(path)

    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json() == content


async def test_metadata_shows_the_signature_with_its_batch(client: httpx.AsyncClient) -> None:
    """A size that varies is -1; the batch dimension is included."""
    answer = await client.get("/v2/models/echo")

    assert answer.json() == {
        "name": "echo",
        "versions": ["1.1"],
        "platform": "test",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}],
        "outputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}],
    }


async def test_an_inference_is_bound_to_a_pair_and_answered(client: httpx.AsyncClient, backend: FakeInference) -> None:
    """The stage behind gets the pair that was chosen here."""
    answer = await client.post("/v2/models/echo/infer", json={"id": "7", "inputs": [ROW]})

    assert answer.json() == {"id": "7", "model_name": "echo", "model_version": "1.1", "outputs": [ROW]}
    assert backend.requests[0].version == "1.1"


RAW_BODY = {"content": np.zeros(2, np.float32).tobytes(), "headers": {"inference-header-content-length": "0"}}


@pytest.mark.parametrize(
    ("path", "sent"),
    [
        ("/v2/models/echo/infer", {"json": {"inputs": [ROW]}}),
        ("/v2/models/echo/infer", RAW_BODY),
        ("/v1/models/echo:predict", {"json": {"instances": [[1.0, 2.5]]}}),
        ("/v1/models/echo:predict", {"json": {"inputs": {"x": [[1.0, 2.5]]}}}),
    ],
    ids=["V2", "raw", "V1 rows", "V1 columns"],
)
async def test_a_request_of_any_form_that_names_no_version_gets_the_next_release(path: str, sent: dict[str, Any]) -> None:
    """The one that it was bound to was withdrawn in the same moment."""
    specs = [TensorSpec("x", "FP32", ("batch", 2))]
    backend = FakeInference(*[signature("echo", specs, version=version) for version in ("1.2", "1.1")])
    newer, older = (
        ModelState("echo", version, READY, properties={DEFAULT: "true", RELEASE_SEQUENCE: sequence})
        for version, sequence in (("1.2", "2"), ("1.1", "1"))
    )

    async def infer(request: InferRequest) -> InferResponse:
        backend.requests.append(request)
        if request.version == "1.2":
            backend.states = [older]
            raise NotFound("1.2 is gone", stage="preprocess")
        return InferResponse("echo", request.version, request.inputs)

    backend.infer = infer  # type: ignore[method-assign]
    backend.states = [newer]
    service = ProxyService(backend)
    await service.refresh()
    config = RestConfig(metadata=ServerMetadata("splitserve", "0"), max_body_bytes=LIMIT, default_timeout_s=30, grace_s=1)
    async with client_of(RestApp(service, config)) as client:
        named = path.replace("models/echo", "models/echo/versions/1.2")
        statuses = [(await client.post(each, **sent)).status_code for each in (named, path)]

    assert statuses == [404, 200]
    assert [request.version for request in backend.requests] == ["1.2", "1.2", "1.1"]


async def test_binary_tensors_are_accepted_and_returned(client: httpx.AsyncClient) -> None:
    """The JSON's length is in the header, in both directions; the bytes are the tensor's."""
    raw = np.array([[1.5, -2]], np.float32).tobytes()
    head = json.dumps(
        {
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}}],
            "outputs": [{"name": "x", "parameters": {"binary_data": True}}],
        }
    ).encode()

    answer = await client.post(
        "/v2/models/echo/infer", content=head + raw, headers={"Inference-Header-Content-Length": str(len(head))}
    )

    length = int(answer.headers["inference-header-content-length"])
    assert answer.headers["content-type"] == "application/octet-stream"
    assert json.loads(answer.content[:length])["outputs"][0]["parameters"] == {"binary_data_size": 8}
    assert answer.content[length:] == raw


REFUSED: dict[str, tuple[str, str, dict[str, Any], int, str]] = {
    "unknown path": ("GET", "/v3", {}, 404, "Not Found"),
    "unknown model": ("POST", "/v2/models/nope/infer", {"json": {"inputs": []}}, 404, "Request for unknown model"),
    "unknown version": ("POST", "/v2/models/echo/versions/2.1/infer", {"json": {"inputs": []}}, 404, "version 2.1"),
    "a folder above": ("GET", "/v2/models/..%2f..%2fetc", {}, 404, "Not Found"),
    "wrong method": ("GET", "/v2/models/echo/infer", {}, 405, "GET is not allowed for this path"),
    "empty body": ("POST", "/v2/models/echo/infer", {}, 400, "the request body is empty, expected JSON"),
    "not JSON": ("POST", "/v2/models/echo/infer", {"content": b"{"}, 400, "not JSON"),
    "no inputs": ("POST", "/v2/models/echo/infer", {"json": {}}, 400, "inputs"),
    "multipart": ("POST", "/v2/models/echo/infer", {"files": {"x": b"1"}}, 415, "multipart"),
    "compressed": ("POST", "/v2/models/echo/infer", {"content": b"", "headers": {"content-encoding": "br"}}, 415, "br"),
    "too large": ("POST", "/v2/models/echo/infer", {"content": b" " * (LIMIT + 1)}, 413, f"at most {LIMIT}"),
    "unknown output": (
        "POST",
        "/v2/models/echo/infer",
        {"json": {"inputs": [ROW], "outputs": [{"name": "y"}]}},
        400,
        'unknown output "y", expected one of "x"',
    ),
    "header length": (
        "POST",
        "/v2/models/echo/infer",
        {"json": {"inputs": [ROW]}, "headers": {"inference-header-content-length": "-1"}},
        400,
        "Inference-Header-Content-Length",
    ),
    "huge header length": (
        "POST",
        "/v2/models/echo/infer",
        {"json": {"inputs": [ROW]}, "headers": {"inference-header-content-length": "99999999999"}},
        400,
        "Inference-Header-Content-Length",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_errors_have_the_protocols_form(client: httpx.AsyncClient, case: str) -> None:
    """Every refusal has ``{"error": …}``, and the content type that clients compare."""
    method, path, options, status, message = REFUSED[case]

    answer = await client.request(method, path, **options)

    assert answer.status_code == status
    assert message in answer.json()["error"]
    assert answer.headers["content-type"] == "application/json"


async def test_the_index_lists_the_state_of_every_version(client: httpx.AsyncClient) -> None:
    """With the reason; only what is ready if asked so."""
    entry = {"name": "echo", "version": "1.1", "state": "READY", "reason": ""}

    everything = await client.post("/v2/repository/index")
    ready = await client.post("/v2/repository/index", json={"ready": True})

    assert everything.json() == ready.json() == [entry]


async def test_models_are_loaded_and_unloaded_only_where_allowed(client: httpx.AsyncClient, backend: FakeInference) -> None:
    """By default models cannot be loaded or unloaded by callers."""
    service = ProxyService(backend)
    await service.refresh()
    metadata = ServerMetadata("s", "0")
    app = RestApp(
        service, RestConfig(metadata=metadata, max_body_bytes=LIMIT, default_timeout_s=30, allow_control=True, grace_s=1)
    )

    refused = await client.post("/v2/repository/models/echo/unload")
    async with client_of(app) as operator:
        done = [await operator.post(f"/v2/repository/models/echo/{action}") for action in ("unload", "load")]
        config = await operator.post("/v2/repository/models/echo/load", json={"parameters": {"config": "{}"}})

    assert (refused.status_code, refused.json()["reason"]) == (403, "PERMISSION_DENIED")
    assert [answer.status_code for answer in done] == [200, 200]
    assert backend.controlled == [("unload", "echo"), ("load", "echo")]
    assert config.status_code == 400


async def test_a_wrong_method_is_405_with_allow(client: httpx.AsyncClient) -> None:
    """405 comes with Allow."""
    infer = await client.get("/v2/models/echo/infer")
    live = await client.post("/v2/health/live")

    assert infer.headers["allow"] == "POST"
    assert live.headers["allow"] == "GET, HEAD"


async def test_head_is_get_without_a_body(client: httpx.AsyncClient) -> None:
    """Probes may use it."""
    answer = await client.head("/v2/health/ready")

    assert (answer.status_code, answer.content) == (200, b"")
    assert int(answer.headers["content-length"]) > 0


async def test_a_body_without_a_length_is_cut_off_at_the_limit(app: RestApp) -> None:
    """Nothing is gathered beyond the limit, however much is sent; what is on its way is taken for a while after the answer."""
    chunk = b"3e8\r\n" + b" " * 1000 + b"\r\n"
    async with RestFace(app) as face, asyncio.timeout(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", face.port)
        writer.write(b"POST /v2/models/echo/infer HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        writer.write(chunk * (LIMIT // 1000 + 1))
        head = await reader.readuntil(b"\r\n\r\n")
        writer.write(chunk + b"0\r\n\r\n")
        rest = await reader.read()
        writer.close()

    assert head.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in head
    assert json.loads(rest)["reason"] == "TOO_LARGE"


async def test_not_ready_is_503_with_the_reason(client: httpx.AsyncClient, app: RestApp) -> None:
    """A probe sees the status, a person the reason; live stays true."""
    app.is_draining = True

    ready = await client.get("/v2/health/ready")
    live = await client.get("/v2/health/live")

    assert (ready.status_code, ready.json()["error"], ready.headers["retry-after"]) == (503, "draining", "1")
    assert live.status_code == 200


def failing(error: Exception) -> Any:
    def answer(request: InferRequest) -> InferResponse:
        raise error

    return answer


async def answer_to(error: Exception) -> httpx.Response:
    """What a client gets when the stage behind fails like this."""
    backend = FakeInference(signature("echo", [TensorSpec("x", "FP32", ("batch", 2))], version="1.1"), answer=failing(error))
    service = ProxyService(backend)
    await service.refresh()
    app = RestApp(service, RestConfig(metadata=ServerMetadata("s", "0"), max_body_bytes=LIMIT, default_timeout_s=30, grace_s=1))
    async with client_of(app) as client:
        return await client.post("/v2/models/echo/infer", json={"inputs": [ROW]})


async def test_an_error_of_a_later_stage_keeps_its_status() -> None:
    """Status, reason, stage, model and pair come through; what may be retried says when."""
    overloaded = await answer_to(Overloaded("full", stage="predict"))
    mismatch = await answer_to(PairMismatch("broken", stage="preprocess"))

    assert (overloaded.status_code, overloaded.headers["retry-after"]) == (429, "1")
    assert overloaded.json() == {
        "error": "full",
        "reason": "OVERLOADED",
        "stage": "predict",
        "model": "echo",
        "pair": "1.1",
    }
    assert (mismatch.status_code, mismatch.json()["stage"]) == (500, "preprocess")
    assert "retry-after" not in mismatch.headers


async def test_an_unexpected_exception_is_not_shown() -> None:
    """The caller learns that it was internal, and nothing of what it was."""
    answer = await answer_to(KeyError("/secret/path"))

    assert answer.status_code == 500
    assert answer.json()["error"] == "internal error"
    assert "secret" not in answer.text


async def test_an_output_without_a_json_form_suggests_binary() -> None:
    """FP16 and bytes that are not text need the binary form."""

    def answer(request: InferRequest) -> InferResponse:
        return InferResponse("echo", "1.1", (Tensor("x", "FP16", (1, 2), b"\x00" * 4),))

    backend = FakeInference(signature("echo", [TensorSpec("x", "FP32", ("batch", 2))], version="1.1"), answer=answer)
    service = ProxyService(backend)
    await service.refresh()
    app = RestApp(service, RestConfig(metadata=ServerMetadata("s", "0"), max_body_bytes=LIMIT, default_timeout_s=30, grace_s=1))
    async with client_of(app) as client:
        refused = await client.post("/v2/models/echo/infer", json={"inputs": [ROW]})

    assert refused.status_code == 400
    assert "binary_data" in refused.json()["error"]


async def test_the_page_and_the_document_need_no_other_host(client: httpx.AsyncClient) -> None:
    """The API's page works offline: it names no other address."""
    page = await client.get("/docs")
    document = await client.get("/openapi.json")

    assert page.headers["content-type"].startswith("text/html")
    assert "http://" not in page.text
    assert "https://" not in page.text
    assert document.json()["openapi"].startswith("3.1")


@pytest.fixture
async def versions() -> AsyncIterator[tuple[httpx.AsyncClient, FakeInference]]:
    """A model whose pairs are 1.1, 2.1 and 1.2."""
    specs = [TensorSpec("x", "FP32", ("batch", 2))]
    backend = FakeInference(*(signature("echo", specs, version=pair) for pair in ("1.1", "2.1", "1.2")))
    service = ProxyService(backend)
    await service.refresh()
    config = RestConfig(metadata=ServerMetadata("s", "0"), max_body_bytes=LIMIT, grace_s=1)
    async with client_of(RestApp(service, config)) as client:
        yield client, backend


@pytest.mark.parametrize(("asked", "pair"), [("1", "2.1"), ("2", "1.2"), ("1.1", "1.1")])
async def test_a_predictors_number_alone_is_its_newest_pair(
    versions: tuple[httpx.AsyncClient, FakeInference], asked: str, pair: str
) -> None:
    """Clients of servers with plain version numbers pin ``model_version="1"``; the answer names the pair."""
    client, backend = versions
    model = f"/v2/models/echo/versions/{asked}"

    answer = await client.post(f"{model}/infer", json={"inputs": [ROW]})
    others = [await client.get(model + path) for path in ("", "/ready", "/config", "/stats")]

    assert (answer.status_code, answer.json()["model_version"]) == (200, pair)
    assert backend.requests[-1].version == pair
    assert [other.status_code for other in others] == [200] * 4


@pytest.mark.parametrize(
    ("asked", "hint"),
    [("3", ""), ("3.1", '; "splitserve release echo 3.1" proves a pair of published halves and makes it one')],
)
async def test_the_error_for_an_unknown_version_lists_the_existing_ones(
    versions: tuple[httpx.AsyncClient, FakeInference], asked: str, hint: str
) -> None:
    """The newest first, so that a wrong pin can be mended from the message; and how a pair becomes a version."""
    answer = await versions[0].post(f"/v2/models/echo/versions/{asked}/infer", json={"inputs": [ROW]})

    assert answer.status_code == 404
    assert (
        answer.json()["error"]
        == f"Request for unknown model: 'echo' is not found, version {asked}; its versions: 2.1, 1.2, 1.1{hint}"
    )
