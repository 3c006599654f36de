"""What answers is no server of the protocol, or not the right one: that is what is reported, not its consequences."""

from __future__ import annotations

import socket

import numpy as np
import pytest

from splitserve.errors import Internal, NotFound, PermissionDenied, SplitserveError, Unauthenticated, Unavailable, Unsupported
from splitserve.signature import TensorSpec
from splitserve.testing import FakeInference, signature
from tests.client.scripted import http, scripted
from tests.client.ways import Way

ROWS = np.ones((1, 2), np.float32)
LOGIN = http(200, body=b"<html>Log in</html>", content_type="text/html; charset=utf-8")

ANSWERS: dict[str, tuple[bytes, type[SplitserveError], str]] = {
    "a login page": (LOGIN, Unavailable, "answered with a web page"),
    "a redirect": (http(302, body=b"", location="https://sso/login"), Internal, "a redirect to https://sso/login"),
    "a proxy without its server": (
        http(502, body=b"<html>", server="nginx", content_type="text/html"),
        Unavailable,
        "502 .nginx",
    ),
    "a proxy that fails": (http(500, body=b"<html>", content_type="text/html"), Internal, "HTTP status 500"),
    "another API": (http(404, {"detail": "Not Found"}), NotFound, 'has no model "echo", or is no Open Inference Protocol server'),
    "no token": (http(401, {"error": "a token is required"}), Unauthenticated, "a token is required"),
    "another token": (http(403, {"error": "not yours"}), PermissionDenied, "not yours"),
    "no model of that name": (http(404, {"error": 'unknown model "echo"'}), NotFound, 'unknown model "echo"'),
}


@pytest.mark.parametrize("name", ANSWERS)
async def test_the_server_is_what_is_wrong_not_the_inputs(rest: Way, name: str) -> None:
    """Inputs without names need the signature: why there is none is the error; the URL is named where the server says nothing."""
    data, kind, message = ANSWERS[name]

    async with scripted(data, metadata=data) as server, rest.at(server.url, max_attempts=1) as client:
        with pytest.raises(kind, match=message) as raised:
            await client.infer("echo", ROWS)

    assert "have no names" not in raised.value.message
    assert server.url in raised.value.message or "error" in data.decode()


async def test_a_login_page_is_not_taken_for_health(rest: Way) -> None:
    """Its status is 200, too."""
    async with scripted(LOGIN) as server, rest.at(server.url) as client:
        with pytest.raises(Unavailable, match="web page"):
            await client.is_live()


async def test_a_wrong_model_is_reported_over_both_transports(way: Way) -> None:
    """By name, whatever the inputs."""
    service = FakeInference(signature("echo", [TensorSpec("x", "FP32", ("batch", 2))]))

    async with way.to(service) as client:
        with pytest.raises(NotFound, match="nope"):
            await client.infer("nope", ROWS)


async def test_rest_at_the_grpc_port_is_said_so(rest: Way) -> None:
    """With the URL to use."""
    async with Way(is_rest=False, is_async=True).serving(FakeInference()) as address, rest.at(f"http://{address}") as client:
        with pytest.raises(Unavailable, match=f"Use grpc://{address}"):
            await client.is_live()


async def test_grpc_at_the_rest_port_is_said_so(grpc_way: Way) -> None:
    """With the URL to use."""
    async with Way(is_rest=True, is_async=True).serving(FakeInference()) as url:
        address = url.removeprefix("http://")
        async with grpc_way.at(address, max_attempts=1) as client:
            with pytest.raises(Unavailable, match=f"Use http://{address}"):
                await client.is_live()


async def test_an_address_where_nothing_listens_is_named_with_the_cause(way: Way) -> None:
    """As the system says it."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        async with way.at(f"http://{address}" if way.is_rest else address, max_attempts=1) as client:
            with pytest.raises(Unavailable, match=f"{address}.*Connection refused"):
                await client.is_live()


async def test_a_grpc_server_of_another_service_is_said_so(grpc_way: Way) -> None:
    """It has none of the methods."""
    import grpc

    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc_way.at(f"127.0.0.1:{port}", max_attempts=1) as client:
            with pytest.raises(
                Unsupported, match=f"127.0.0.1:{port} does not offer inference.GRPCInferenceService/ModelMetadata"
            ):
                await client.infer("echo", ROWS)
    finally:
        await server.stop(None)
