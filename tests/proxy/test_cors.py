"""Web pages of other origins, and ids of requests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
from pydantic import ValidationError

from proxy.rest.app import RestApp
from proxy.rest.config import RestConfig
from proxy.rest.server import RestFace
from proxy.service import ProxyService
from proxy.settings import ProxySettings
from splitserve.oip.messages import ServerMetadata
from splitserve.signature import TensorSpec
from splitserve.testing import FakeInference, signature

PAGE = "https://app.example.com"
BODY = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}
ASKS = {"origin": PAGE, "access-control-request-method": "POST", "access-control-request-headers": "content-type"}


@pytest.fixture
async def client(request: pytest.FixtureRequest) -> AsyncIterator[httpx.AsyncClient]:
    service = ProxyService(FakeInference(signature("echo", [TensorSpec("x", "FP32", ("batch", 2))], version="1.1")))
    await service.refresh()
    config = RestConfig(
        metadata=ServerMetadata("splitserve", "0"),
        max_body_bytes=10_000,
        default_timeout_s=30,
        grace_s=1,
        cors_origins=getattr(request, "param", ()),
    )
    async with (
        RestFace(RestApp(service, config)) as face,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{face.port}", trust_env=False, verify=False) as client,
    ):
        yield client


async def test_by_default_no_other_page_may_read_answers(client: httpx.AsyncClient) -> None:
    """Neither asked before, nor in the answer."""
    asked = await client.options("/v2/models/echo/infer", headers=ASKS)
    answered = await client.post("/v2/models/echo/infer", json=BODY, headers={"origin": PAGE})

    assert asked.status_code == 405
    assert answered.status_code == 200
    assert not [name for name in (*asked.headers, *answered.headers) if name.startswith("access-control")]


@pytest.mark.parametrize("client", [(PAGE,)], indirect=True)
async def test_a_page_of_an_allowed_origin_may_call(client: httpx.AsyncClient) -> None:
    """Errors, too, are readable; other origins are not told anything."""
    asked = await client.options("/v2/models/echo/infer", headers=ASKS)
    answers = [
        await client.post("/v2/models/echo/infer", json=BODY, headers={"origin": PAGE}),
        await client.post("/v2/models/echo/infer", content=b"{", headers={"origin": PAGE}),
        await client.get("/v2/models/echo", headers={"origin": PAGE}),
        await client.get("/nowhere", headers={"origin": PAGE}),
    ]
    other = await client.post("/v2/models/echo/infer", json=BODY, headers={"origin": "https://evil.example.com"})

    assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (204, PAGE)
    assert "POST" in asked.headers["access-control-allow-methods"]
    assert "content-type" in asked.headers["access-control-allow-headers"]
    assert [answer.status_code for answer in answers] == [200, 400, 200, 404]
    assert {answer.headers["access-control-allow-origin"] for answer in answers} == {PAGE}
    assert all("origin" in answer.headers["vary"] for answer in answers)
    assert (other.status_code, "access-control-allow-origin" in other.headers) == (200, False)


@pytest.mark.parametrize("client", [("*",)], indirect=True)
async def test_any_origin_can_be_allowed(client: httpx.AsyncClient) -> None:
    """By a star."""
    answered = await client.get("/v2", headers={"origin": PAGE})

    assert answered.headers["access-control-allow-origin"] == "*"


async def test_an_id_of_a_request_is_taken_and_echoed(client: httpx.AsyncClient) -> None:
    """In the header of every response; as the protocol's id, unless the body has one. One that cannot be an id is not."""
    infer = "/v2/models/echo/infer"
    named = await client.post(infer, json=BODY, headers={"x-request-id": "r-1"})
    both = await client.post(infer, json={**BODY, "id": "mine"}, headers={"x-request-id": "r-2"})
    failed = await client.get("/nowhere", headers={"x-request-id": "r-3"})
    without = await client.post(infer, json=BODY)
    odd = await client.post(infer, json=BODY, headers={"x-request-id": "a b" * 100})

    assert [each.headers.get("x-request-id") for each in (named, both, failed)] == ["r-1", "r-2", "r-3"]
    assert without.headers["x-request-id"].isalnum()
    assert odd.headers["x-request-id"].isalnum()
    assert [each.json().get("id") for each in (named, both, without, odd)] == ["r-1", "mine", None, None]


@pytest.mark.parametrize("origins", ["app.example.com", "https://app.example.com/path", "https://*.example.com"])
def test_what_is_no_origin_stops_the_start(origins: str) -> None:
    """The setting is named."""
    with pytest.raises(ValidationError, match="expected origins like"):
        ProxySettings(cors_origins=origins)
