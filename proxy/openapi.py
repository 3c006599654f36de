"""The OpenAPI document of the REST face, as it is, not as it might become."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

_DATATYPES = [
    "BOOL", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64", "FP16", "BF16", "FP32", "FP64", "BYTES",
]  # fmt: skip

_MODEL: Schema = {
    "name": "model",
    "in": "path",
    "required": True,
    "schema": {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"},
    "example": "penguins",
}
_VERSION: Schema = {
    "name": "version",
    "in": "path",
    "required": True,
    "description": 'A pair: preprocessor version K with predictor version M, written "K.M".',
    "schema": {"type": "string", "pattern": "^[1-9][0-9]{0,8}\\.[1-9][0-9]{0,8}$"},
    "example": "1.1",
}
_HEADER_LENGTH: Schema = {
    "name": "Inference-Header-Content-Length",
    "in": "header",
    "description": "Bytes of JSON at the beginning of the body, if binary tensors follow it.",
    "schema": {"type": "integer", "minimum": 1},
}


def document(version: str) -> Schema:
    """The document.

    Args:
        version: of splitserve.
    """
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "splitserve",
            "version": version,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            "description": "Models served in two halves: a scikit-learn preprocessor and an ONNX predictor. The Open Inference "
            "Protocol V2 over REST, and the V1 form; the same over gRPC on the port beside this one.",
        },
        "tags": [
            {"name": "inference", "description": "Rows in, predictions out."},
            {"name": "models", "description": "What there is, and what it takes."},
            {"name": "health", "description": "For probes and load balancers."},
        ],
        "paths": _paths(),
        "components": {"schemas": _schemas(), "responses": _error_responses()},
    }


def _paths() -> dict[str, Schema]:
    paths: dict[str, Schema] = {
        "/v2/health/live": {"get": _get("The process answers", "health", "Live")},
        "/v2/health/ready": {"get": _get("At least one model can be inferred now", "health", "Ready", "503")},
        "/v2": {"get": _get("Name, version and extensions of the server", "models", "Server")},
        "/v2/models": {"get": _get("Names of the models", "models", "Models")},
        "/v2/repository/index": {"post": _index()},
        "/v2/repository/models/{model}/load": {"post": _control("Serve a model again, newest versions"), "parameters": [_MODEL]},
        "/v2/repository/models/{model}/unload": {"post": _control("Serve no version of a model"), "parameters": [_MODEL]},
        "/v1/models": {"get": _get("Names of the models", "models", "Models")},
    }
    for middle, parameters in (("", [_MODEL]), ("/versions/{version}", [_MODEL, _VERSION])):
        v2, v1 = f"/v2/models/{{model}}{middle}", f"/v1/models/{{model}}{middle}"
        paths[v2] = {"get": _get("Signature of a model", "models", "Model", "404", "503"), "parameters": parameters}
        ready = _get("Whether it can be inferred now", "health", "ModelReady", "404", "503")
        paths[f"{v2}/ready"] = {"get": ready, "parameters": parameters}
        paths[v1] = {"get": ready, "parameters": parameters}
        paths[f"{v2}/infer"] = {"post": _infer(), "parameters": parameters}
        paths[f"{v1}:predict"] = {"post": _predict(), "parameters": parameters}
    return paths


def _get(summary: str, tag: str, schema: str, *errors: str) -> Schema:
    return {"summary": summary, "tags": [tag], "responses": {"200": _json(schema, summary), **_errors(*errors)}}


def _infer() -> Schema:
    binary = {"schema": {"type": "string", "format": "binary"}}
    answer = _json("InferResponse", "The outputs")
    answer["content"]["application/octet-stream"] = binary
    return {
        "summary": "Infer (V2)",
        "tags": ["inference"],
        "parameters": [_HEADER_LENGTH],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _ref("InferRequest")}, "application/octet-stream": binary},
        },
        "responses": {"200": answer, **_errors(*_INFER_ERRORS)},
    }


def _predict() -> Schema:
    return {
        "summary": "Infer (V1)",
        "tags": ["inference"],
        "requestBody": {"required": True, "content": {"application/json": {"schema": _ref("PredictRequest")}}},
        "responses": {"200": _json("PredictResponse", "A prediction for each instance"), **_errors(*_INFER_ERRORS)},
    }


def _index() -> Schema:
    answer = {"description": "All versions, ready or not", "content": {"application/json": {"schema": _array(_ref("State"))}}}
    wish = {"required": False, "content": {"application/json": {"schema": _object({"ready": {"type": "boolean"}})}}}
    summary = "States of all versions, and why they are not ready"
    return {
        "summary": summary,
        "tags": ["models"],
        "requestBody": wish,
        "responses": {"200": answer, **_errors("400", "413", "415")},
    }


def _control(summary: str) -> Schema:
    answer = {"description": "Done", "content": {"application/json": {"schema": {"type": "object"}}}}
    errors = _errors("400", "403", "404", "413", "415", "500", "503", "504")
    return {"summary": f"{summary} (where it is allowed)", "tags": ["models"], "responses": {"200": answer, **errors}}


_ERRORS = {
    "400": "The request is malformed: a name, datatype, shape, length or value, which the message names",
    "403": "Not allowed here",
    "404": "No such model or version",
    "413": "The body is larger than the limit",
    "415": "The body's encoding is not taken",
    "429": "Too much is waiting already",
    "500": "A fault of the service, never of the caller",
    "503": "Not ready: loading, draining, or a stage can not be reached",
    "504": "Out of time",
}
_INFER_ERRORS = tuple(status for status in _ERRORS if status != "403")


def _errors(*statuses: str) -> Schema:
    return {status: {"$ref": f"#/components/responses/{status}"} for status in statuses}


def _error_responses() -> dict[str, Schema]:
    responses = {status: _json("Error", description) for status, description in _ERRORS.items()}
    for status in ("429", "503"):
        responses[status]["headers"] = {
            "Retry-After": {"description": "Seconds to wait before another try.", "schema": {"type": "integer"}}
        }
    return responses


def _json(schema: str, description: str) -> Schema:
    return {"description": description, "content": {"application/json": {"schema": _ref(schema)}}}


def _ref(schema: str) -> Schema:
    return {"$ref": f"#/components/schemas/{schema}"}


def _object(properties: Schema, *required: str, **more: Any) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required), **more}


def _array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _schemas() -> dict[str, Schema]:
    text: Schema = {"type": "string"}
    yes: Schema = {"type": "boolean"}
    datatype = {"type": "string", "enum": _DATATYPES}
    parameters = {"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}}
    size = {"type": "integer", "minimum": 0}
    tensor = {"name": text, "datatype": datatype, "shape": _array(size), "parameters": parameters}
    data = {"type": "array", "description": "Row-major, flat or nested as the shape says."}
    spec = _object(
        {"name": text, "datatype": datatype, "shape": _array({"type": "integer", "minimum": -1})}, "name", "datatype", "shape"
    )
    return {
        "Live": _object({"live": yes}, "live"),
        "Ready": _object({"ready": yes, "live": yes}, "ready"),
        "ModelReady": _object({"name": text, "ready": yes}, "name", "ready"),
        "Server": _object({"name": text, "version": text, "extensions": _array(text)}, "name", "version", "extensions"),
        "Models": _object({"models": _array(text)}, "models"),
        "Model": _object(
            {
                "name": text,
                "versions": _array(text),
                "platform": text,
                "inputs": _array(spec),
                "outputs": _array(spec),
                "properties": {"type": "object", "additionalProperties": text},
            },
            "name",
            "platform",
            "inputs",
            "outputs",
        ),
        "InferRequest": _object(
            {
                "id": text,
                "parameters": parameters,
                "inputs": _array(_object({**tensor, "data": data}, "name", "datatype", "shape")),
                "outputs": _array(_object({"name": text, "parameters": parameters}, "name")),
            },
            "inputs",
            example={"inputs": [{"name": "features", "datatype": "FP32", "shape": [1, 3], "data": [1.0, 2.0, 3.0]}]},
        ),
        "InferResponse": _object(
            {
                "id": text,
                "model_name": text,
                "model_version": text,
                "parameters": parameters,
                "outputs": _array(_object({**tensor, "data": data}, "name", "datatype", "shape")),
            },
            "model_name",
            "model_version",
            "outputs",
        ),
        "PredictRequest": _object(
            {
                "instances": {
                    "type": "array",
                    "description": "A record by input name, or the values in the signature's order.",
                }
            },
            "instances",
            example={"instances": [{"bill_length_mm": 39.1, "island": "Torgersen"}]},
        ),
        "PredictResponse": _object({"predictions": {"type": "array"}}, "predictions"),
        "State": _object({"name": text, "version": text, "state": text, "reason": text}, "name", "version", "state"),
        "Error": _object({"error": text, "reason": text, "stage": text, "model": text, "pair": text}, "error"),
    }
