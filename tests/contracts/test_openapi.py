"""The OpenAPI document: valid, and of exactly the paths that there are."""

from __future__ import annotations

import re

import pytest
from openapi_spec_validator import validate

from proxy.rest.app import RestApp
from proxy.rest.config import RestConfig
from proxy.rest.openapi import document
from proxy.service import ProxyService
from splitserve.errors import TABLE
from splitserve.oip.messages import ServerMetadata
from splitserve.testing import FakeInference

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
