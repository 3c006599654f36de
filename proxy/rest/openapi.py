"""The OpenAPI document of the REST face: ``openapi.json``, completed with what depends on the service."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any

import msgspec

from splitserve.oip.messages import ModelMetadata
from splitserve.signature import TensorSpec

Schema = dict[str, Any]

_VERSION: Schema = {"$ref": "#/components/parameters/version"}
_OPEN = ("/v2", "/v2/health/live", "/v2/health/ready")
"""Paths that need no token."""

_MAX_ELEMENTS = 1_000
_BINARY = {"FP16": 2, "BF16": 2}
"""The datatypes that JSON has no elements of, and the bytes of an element."""
_ZEROS: dict[str, Any] = {"BYTES": "", "BOOL": False, "FP32": 0.0, "FP64": 0.0}


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
            for method in item.keys() & {"get", "post", "delete"}:
                versioned[method] = {**item[method], "operationId": f"{item[method]['operationId']}OfVersion"}
            paths[path.replace("{model}", "{model}/versions/{version}")] = versioned
    if requires_tokens:
        content["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for path in paths.keys() - set(_OPEN):
            _require_tokens(paths[path])
    return content


def with_examples(content: Schema, models: Iterable[ModelMetadata]) -> Schema:
    """The document, with a request for each model that works as it stands: a row of zeros, and of missing text.

    JSON cannot hold FP16 and BF16: such inputs are zeros after the JSON, in an example of the binary media type, whose length of
    JSON is an example of that header.
    """
    v2: Schema = {}
    v1: Schema = {}
    binary: Schema = {}
    lengths: Schema = {}
    for metadata in models:
        row = _row(metadata)
        if row is None:
            continue
        summary = f"{metadata.name}, one row"
        if any(spec.datatype in _BINARY for spec in metadata.inputs):
            header, body = _binary_request(metadata, row)
            binary[metadata.name] = {"summary": summary, "value": header + body}
            lengths[metadata.name] = {"summary": summary, "value": len(header)}
            continue
        inputs = [
            {"name": spec.name, "datatype": spec.datatype, "shape": [1, *_inner(spec)], "data": values}
            for spec, values in zip(metadata.inputs, row, strict=True)
        ]
        v2[metadata.name] = {"summary": summary, "value": {"inputs": inputs}}
        columns = {spec.name: _nested(values, _inner(spec)) for spec, values in zip(metadata.inputs, row, strict=True)}
        instance = columns if len(columns) > 1 else next(iter(columns.values()))
        v1[metadata.name] = {"summary": summary, "value": {"instances": [instance]}}
    shown: Schema = {**content, "paths": dict(content["paths"])}
    for path, by_type in (
        ("/v2/models/{model}/infer", {"application/json": v2, "application/octet-stream": binary}),
        ("/v1/models/{model}:predict", {"application/json": v1}),
    ):
        if any(by_type.values()):
            shown["paths"][path] = _with_examples(shown["paths"][path], by_type, lengths)
    return shown


def _binary_request(metadata: ModelMetadata, row: Sequence[list[Any]]) -> tuple[str, str]:
    """JSON in ASCII, and the bytes that follow it: zeros, which are the same in UTF-8."""
    inputs: list[Schema] = []
    n_bytes = 0
    for spec, values in zip(metadata.inputs, row, strict=True):
        tensor: Schema = {"name": spec.name, "datatype": spec.datatype, "shape": [1, *_inner(spec)]}
        if spec.datatype in _BINARY:
            size = _BINARY[spec.datatype] * len(values)
            tensor["parameters"] = {"binary_data_size": size}
            n_bytes += size
        else:
            tensor["data"] = values
        inputs.append(tensor)
    header = json.dumps({"parameters": {"binary_data_output": True}, "inputs": inputs})
    return header, "\0" * n_bytes


def _with_examples(item: Schema, by_type: dict[str, Schema], lengths: Schema) -> Schema:
    operation = item["post"]
    body = operation["requestBody"]
    content = dict(body["content"])
    for media_type, examples in by_type.items():
        if examples:
            content[media_type] = {**content[media_type], "examples": examples}
    names = {name: None for examples in by_type.values() for name in examples}
    parameters = [_length_of(each, lengths) for each in operation["parameters"]]
    return {
        **item,
        "parameters": [_model_of(each, names) for each in item["parameters"]],
        "post": {**operation, "parameters": parameters, "requestBody": {**body, "content": content}},
    }


def _length_of(parameter: Schema, lengths: Schema) -> Schema:
    """The parameter with the length of JSON in each binary example."""
    if not lengths or parameter != {"$ref": "#/components/parameters/header-length"}:
        return parameter
    return {
        "name": "Inference-Header-Content-Length",
        "in": "header",
        "description": "Bytes of JSON at the beginning of the body, if binary tensors follow.",
        "schema": {"type": "integer", "minimum": 0},
        "examples": lengths,
    }


def _model_of(parameter: Schema, examples: Schema) -> Schema:
    """The parameter with the models' names as examples."""
    if parameter != {"$ref": "#/components/parameters/model"}:
        return parameter
    shown = {name: {"value": name} for name in examples}
    return {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}, "examples": shown}


def _row(metadata: ModelMetadata) -> list[list[Any]] | None:
    """The elements of one row of each input; None if it is too large for a document."""
    row: list[list[Any]] = []
    for spec in metadata.inputs:
        size = math.prod(_inner(spec))
        if size > _MAX_ELEMENTS or not spec.shape:
            return None
        row.append([_ZEROS.get(spec.datatype, 0)] * size)
    return row or None


def _inner(spec: TensorSpec) -> list[int]:
    """The shape of a row; variable sizes are 1."""
    return [max(size, 1) for size in spec.wire_shape[1:]]


def _nested(values: list[Any], shape: Sequence[int]) -> Any:
    if shape == [1] or not shape:
        return values[0]
    nested: list[Any] = values
    for size in reversed(shape[1:]):
        nested = [nested[start : start + size] for start in range(0, len(nested), size)]
    return nested


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
