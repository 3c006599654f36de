"""The OpenAPI document of the REST face: ``openapi.json``, completed by what depends on the service that shows it."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import msgspec

Schema = dict[str, Any]

_VERSION: Schema = {"$ref": "#/components/parameters/version"}
_OPEN = ("/v2", "/v2/health/live", "/v2/health/ready")
"""What needs no token."""


def document(version: str, *, asks_for_tokens: bool = False) -> Schema:
    """The document. The file has the paths of a model without a version; each is also there with one.

    Args:
        version: of splitserve.
        asks_for_tokens: there is an authorization file, so calls need a token and may be refused.
    """
    content: Schema = msgspec.json.decode(files("proxy.rest").joinpath("openapi.json").read_bytes())
    content["info"]["version"] = version
    paths = content["paths"]
    for path, item in tuple(paths.items()):
        if "/models/{model}" in path and "repository" not in path:
            versioned = {**item, "parameters": [*item["parameters"], _VERSION]}
            paths[path.replace("{model}", "{model}/versions/{version}")] = versioned
    if asks_for_tokens:
        content["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for path in paths.keys() - set(_OPEN):
            _ask_for_tokens(paths[path])
    return content


def _ask_for_tokens(item: Schema) -> None:
    """Besides 401 and 403, 503: the keys that tokens are verified with cannot be fetched."""
    for method in item.keys() & {"get", "post"}:
        item[method]["security"] = [{"token": []}]
        item[method]["responses"] |= {status: {"$ref": f"#/components/responses/{status}"} for status in ("401", "403", "503")}
