"""The OpenAPI document of the REST face: ``openapi.json``, completed with what depends on the service."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import msgspec

Schema = dict[str, Any]

_VERSION: Schema = {"$ref": "#/components/parameters/version"}
_OPEN = ("/v2", "/v2/health/live", "/v2/health/ready")
"""Paths that need no token."""


def document(version: str, *, requires_tokens: bool = False, has_jobs: bool = True) -> Schema:
    """The document. The file has the paths of a model without a version; those with a version are added.

    Args:
        version: of splitserve.
        requires_tokens: whether there is an authorization file, so that calls need a token.
        has_jobs: whether there is a jobs service; without one, paths of jobs are left out.
    """
    content: Schema = msgspec.json.decode(files("proxy.rest").joinpath("openapi.json").read_bytes())
    content["info"]["version"] = version
    paths = content["paths"]
    if has_jobs:
        for path in ("/v2/models/{model}/infer", "/v1/models/{model}:predict"):
            _may_be_job(paths[path]["post"])
    else:
        for path in [path for path in paths if "/jobs" in path]:
            del paths[path]
    for path, item in tuple(paths.items()):
        if "/models/{model}" in path and "repository" not in path:
            versioned = {**item, "parameters": [*item["parameters"], _VERSION]}
            paths[path.replace("{model}", "{model}/versions/{version}")] = versioned
    if requires_tokens:
        content["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for path in paths.keys() - set(_OPEN):
            _require_tokens(paths[path])
    return content


def _may_be_job(operation: Schema) -> None:
    """An inference that prefers to be a job is answered as the submit of one."""
    named = ("prefer", "idempotency-key", "job-priority", "job-timeout", "job-expires", "webhook", "webhook-events")
    operation["parameters"] = [*operation["parameters"], *({"$ref": f"#/components/parameters/{name}"} for name in named)]
    operation["responses"] |= {status: {"$ref": f"#/components/responses/{status}"} for status in ("202", "410", "422", "507")}


def _require_tokens(item: Schema) -> None:
    """Besides 401 and 403, 503: the keys that tokens are verified with cannot be fetched."""
    for method in item.keys() & {"get", "post", "delete"}:
        item[method]["security"] = [{"token": []}]
        item[method]["responses"] |= {status: {"$ref": f"#/components/responses/{status}"} for status in ("401", "403", "503")}
