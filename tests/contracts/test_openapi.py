"""The OpenAPI document: valid, and of exactly the paths that there are."""

from __future__ import annotations

import re

import httpx
import pytest
from openapi_spec_validator import validate

from proxy.rest.app import RestApp
from proxy.rest.config import RestConfig
from proxy.rest.openapi import document
from proxy.rest.server import RestFace
from proxy.service import ProxyService
from splitserve.errors import TABLE
from splitserve.oip.messages import ServerMetadata
from splitserve.signature import TensorSpec
from splitserve.testing import FakeInference, signature

FOR_PEOPLE = {"/", "/docs", "/openapi.json"}
"""Paths that are no part of the API."""


@pytest.mark.parametrize("requires_tokens", [False, True])
def test_the_document_is_valid(requires_tokens: bool) -> None:
    """By the schema of OpenAPI 3.1."""
    validate(document("1.0.0", requires_tokens=requires_tokens))


def test_every_documented_path_is_served_and_every_served_one_documented() -> None:
    """With the same methods."""
    app = RestApp(
        ProxyService(FakeInference()), RestConfig(metadata=ServerMetadata("s", "0"), max_body_bytes=1, default_timeout_s=1)
    )
    documented = {
        (re.sub(r"\{version\}", "1.1", re.sub(r"\{(model|job)\}", "m", path)), method.upper())
        for path, item in document("0")["paths"].items()
        for method in item
        if method in ("get", "post", "delete")
    }

    served = {(path, method) for path, method in documented if any(
        pattern.fullmatch(path) and method in methods for pattern, methods in app._routes
    )}  # fmt: skip
    undocumented = [
        pattern.pattern
        for pattern, methods in app._routes
        if not any(pattern.fullmatch(path) and method in methods for path, method in documented)
        and not any(pattern.fullmatch(path) for path in FOR_PEOPLE)
    ]

    assert served == documented
    assert undocumented == []


def test_every_status_that_an_inference_can_have_is_documented() -> None:
    """The error table and the document agree, but for what has no client (499) or is not for inference (409, 501)."""
    for requires_tokens, never in ((False, {"499", "501", "409", "401", "403"}), (True, {"499", "501", "409"})):
        paths = document("0", requires_tokens=requires_tokens)["paths"]
        responses = set(paths["/v2/models/{model}/infer"]["post"]["responses"])

        expected = {str(error.http_status) for error in TABLE} - never
        assert responses == expected | {"200", "202", "415"}


def test_without_a_jobs_service_there_are_no_jobs_in_the_document() -> None:
    """And no inference says that it could be one."""
    without = document("0", has_jobs=False)

    assert not [path for path in without["paths"] if "jobs" in path]
    assert "202" not in without["paths"]["/v2/models/{model}/infer"]["post"]["responses"]
    validate(without)


def test_operations_that_need_a_token_are_marked() -> None:
    """All except health and server metadata, which need no token."""
    document_ = document("0", requires_tokens=True)

    needs = {path for path, item in document_["paths"].items() if "security" in (item.get("get") or item["post"])}

    assert document_["paths"].keys() - needs == {"/v2", "/v2/health/live", "/v2/health/ready"}
    assert document_["components"]["securitySchemes"] == {"token": {"type": "http", "scheme": "bearer"}}
    assert "security" not in str(document("0"))


def test_every_operation_has_a_name_of_its_own() -> None:
    """What generators call their functions."""
    content = document("0")
    names = [
        item[method]["operationId"]
        for item in content["paths"].values()
        for method in ("get", "post", "delete")
        if method in item
    ]

    assert len(set(names)) == len(names)
    assert {"infer", "inferOfVersion", "predict", "modelMetadata", "submitJob"} <= set(names)


MODELS = [
    signature(
        "penguins",
        [
            TensorSpec("island", "BYTES", ("batch", 1)),
            TensorSpec("mass", "FP64", ("batch", 1)),
            TensorSpec("year", "INT64", ("batch", 1)),
        ],
        version="1.1",
    ),
    signature("images", [TensorSpec("image", "UINT8", ("batch", 2, 2))], version="1.1"),
    signature("halves", [TensorSpec("x", "FP16", ("batch", 2)), TensorSpec("n", "INT64", ("batch", 1))], version="1.1"),
    signature("brains", [TensorSpec("x", "BF16", ("batch", 3))], version="1.1"),
]


async def test_each_model_has_an_example_that_works_as_it_stands() -> None:
    """In V2 and V1; where JSON cannot hold an input, in binary with the header's value. The document stays valid."""
    service = ProxyService(FakeInference(*MODELS))
    await service.refresh()
    app = RestApp(service, RestConfig(metadata=ServerMetadata("s", "0"), max_body_bytes=10_000, default_timeout_s=30, grace_s=1))

    async with RestFace(app) as face, httpx.AsyncClient(base_url=f"http://127.0.0.1:{face.port}", trust_env=False) as client:
        content = (await client.get("/openapi.json")).json()
        validate(content)
        called = []
        for path in ("/v2/models/{model}/infer", "/v1/models/{model}:predict"):
            examples = content["paths"][path]["post"]["requestBody"]["content"]["application/json"]["examples"]
            for model, example in examples.items():
                answer = await client.post(path.replace("{model}", model), json=example["value"])
                called.append((path[:3], model, answer.status_code))
        operation = content["paths"]["/v2/models/{model}/infer"]["post"]
        (length,) = (each for each in operation["parameters"] if each.get("name") == "Inference-Header-Content-Length")
        for model, example in operation["requestBody"]["content"]["application/octet-stream"]["examples"].items():
            answer = await client.post(
                f"/v2/models/{model}/infer",
                content=example["value"].encode(),
                headers={
                    "content-type": "application/octet-stream",
                    "inference-header-content-length": str(length["examples"][model]["value"]),
                },
            )
            called.append(("binary", model, answer.status_code))

    assert sorted(called) == [
        ("/v1", "images", 200),
        ("/v1", "penguins", 200),
        ("/v2", "images", 200),
        ("/v2", "penguins", 200),
        ("binary", "brains", 200),
        ("binary", "halves", 200),
    ]
