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
    "schema": {"type": "string", "pattern": "^[1-9][0-9]{0,8}\\.(0|[1-9][0-9]{0,8})$"},
    "example": "1.1",
}
_HEADER_LENGTH: Schema = {
    "name": "Inference-Header-Content-Length",
    "in": "header",
    "description": "Bytes of JSON at the beginning of the body, if binary tensors follow it; 0: the body is the only input, raw.",
    "schema": {"type": "integer", "minimum": 0, "maximum": 2147483647},
}
_TIMEOUT: Schema = {
    "name": "Request-Timeout",
    "in": "header",
    "description": "Seconds that the request may take.",
    "schema": {"type": "string", "pattern": "^[1-9][0-9]{0,8}(\\.[0-9]{1,9})?$"},
}


_OPEN = ("/v2", "/v2/health/live", "/v2/health/ready")
"""What anyone may ask, with tokens or without."""


def document(version: str, *, asks_for_tokens: bool = False) -> Schema:
    """The document.

    Args:
        version: of splitserve.
        asks_for_tokens: callers must show who they are, and may be refused.
    """
    paths, components = _paths(), {"schemas": _schemas(), "responses": _error_responses()}
    if asks_for_tokens:
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for path in paths.keys() - set(_OPEN):
            _ask_for_tokens(paths[path])
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
        "paths": paths,
        "components": components,
    }


def _paths() -> dict[str, Schema]:
    paths: dict[str, Schema] = {
        "/v2/health/live": {"get": _get("The process answers", "health", "Live")},
        "/v2/health/ready": {"get": _get("At least one model can be inferred now", "health", "Ready", "503")},
        "/v2": {"get": _get("Name, version and extensions of the server", "models", "Server")},
        "/v2/models": {"get": _get("Names of the models", "models", "Models")},
        "/v2/models/stats": {"get": _get("What was inferred since the start, and how long it took", "models", "Statistics")},
        "/v2/repository/index": {"post": _index()},
        "/v2/repository/models/{model}/load": {"post": _control("Serve a model again, newest versions"), "parameters": [_MODEL]},
        "/v2/repository/models/{model}/unload": {"post": _control("Serve no version of a model"), "parameters": [_MODEL]},
        "/v1/models": {"get": _get("Names of the models", "models", "Models")},
    }
    for middle, parameters in (("", [_MODEL]), ("/versions/{version}", [_MODEL, _VERSION])):
        v2, v1 = f"/v2/models/{{model}}{middle}", f"/v1/models/{{model}}{middle}"
        paths[v2] = {"get": _get("Signature of a model", "models", "Model", "404", "503"), "parameters": parameters}
        config = _get("How it is run: rows of a request, its tensors", "models", "Config", "404", "503")
        paths[f"{v2}/config"] = {"get": config, "parameters": parameters}
        counted = _get("What was inferred since the start, and how long it took", "models", "Statistics", "404")
        paths[f"{v2}/stats"] = {"get": counted, "parameters": parameters}
        ready = _get("Whether it can be inferred now", "health", "ModelReady", "404", "503")
        paths[f"{v2}/ready"] = {"get": ready, "parameters": parameters}
        status = _get("Whether it can be inferred now, and the states of its versions", "health", "ModelStatus", "404", "503")
        paths[v1] = {"get": status, "parameters": parameters}
        told = _get("Signature of a model, as TensorFlow Serving tells it", "models", "SignatureDef", "404", "503")
        paths[f"{v1}/metadata"] = {"get": told, "parameters": parameters}
        paths[f"{v2}/infer"] = {"post": _infer(), "parameters": parameters}
        paths[f"{v1}:predict"] = {"post": _predict(), "parameters": parameters}
        paths[f"{v1}:explain"] = {"post": _explain(), "parameters": parameters}
    return paths


def _ask_for_tokens(item: Schema) -> None:
    """503: the keys that tokens are checked by cannot be had now."""
    for method in item.keys() & {"get", "post"}:
        item[method]["security"] = [{"token": []}]
        item[method]["responses"] |= _errors("401", "403", "503")


def _get(summary: str, tag: str, schema: str, *errors: str) -> Schema:
    return {"summary": summary, "tags": [tag], "responses": {"200": _json(schema, summary), **_errors(*errors)}}


def _infer() -> Schema:
    binary = {"schema": {"type": "string", "format": "binary"}}
    answer = _json("InferResponse", "The outputs")
    answer["content"]["application/octet-stream"] = binary
    return {
        "summary": "Infer (V2)",
        "tags": ["inference"],
        "parameters": [_HEADER_LENGTH, _TIMEOUT],
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
        "parameters": [_TIMEOUT],
        "requestBody": {"required": True, "content": {"application/json": {"schema": _ref("PredictRequest")}}},
        "responses": {"200": _json("PredictResponse", "The predictions"), **_errors(*_INFER_ERRORS)},
    }


def _explain() -> Schema:
    summary = "Explanations, which there are none of"
    return {"summary": summary, "tags": ["inference"], "responses": _errors("400", "413", "415", "501")}


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
    "401": "No credentials, or wrong ones",
    "403": "Not allowed here, or not to this caller",
    "404": "No such model or version",
    "413": "The body is larger than the limit",
    "415": "The body's encoding is not taken",
    "429": "Too much is waiting already",
    "500": "A fault of the service, never of the caller",
    "501": "Not offered",
    "503": "Not ready: loading, draining, or a stage cannot be reached",
    "504": "Out of time",
}
_INFER_ERRORS = tuple(status for status in _ERRORS if status not in ("401", "403", "501"))


def _errors(*statuses: str) -> Schema:
    return {status: {"$ref": f"#/components/responses/{status}"} for status in statuses}


def _error_responses() -> dict[str, Schema]:
    responses = {status: _json("Error", description) for status, description in _ERRORS.items()}
    for status in ("429", "503"):
        responses[status]["headers"] = {
            "Retry-After": {"description": "Seconds to wait before another try.", "schema": {"type": "integer"}}
        }
    challenge = {"WWW-Authenticate": {"description": "What is asked for.", "schema": {"type": "string"}}}
    responses["401"]["headers"] = challenge
    return responses


def _json(schema: str, description: str) -> Schema:
    return {"description": description, "content": {"application/json": {"schema": _ref(schema)}}}


def _ref(schema: str) -> Schema:
    return {"$ref": f"#/components/schemas/{schema}"}


def _object(properties: Schema, *required: str, **more: Any) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required), **more}


def _struct(**properties: Schema) -> Schema:
    """An object with all of these."""
    return _object(properties, *properties)


def _by_name(values: Schema) -> Schema:
    return {"type": "object", "additionalProperties": values}


def _array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _schemas() -> dict[str, Schema]:
    text: Schema = {"type": "string"}
    yes: Schema = {"type": "boolean"}
    datatype = {"type": "string", "enum": _DATATYPES}
    parameters = {"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}}
    size: Schema = {"type": "integer", "minimum": 0}
    duration = _ref("Duration")
    tensor = {"name": text, "datatype": datatype, "shape": _array(size), "parameters": parameters}
    data = {"type": "array", "description": "Row-major, flat or nested as the shape says."}
    spec = _object(
        {"name": text, "datatype": datatype, "shape": _array({"type": "integer", "minimum": -1})}, "name", "datatype", "shape"
    )
    return {
        "Live": _object({"live": yes}, "live"),
        "Ready": _object({"ready": yes, "live": yes}, "ready"),
        "ModelReady": _object({"name": text, "ready": yes}, "name", "ready"),
        "ModelStatus": _object(
            {
                "name": text,
                "ready": yes,
                "model_version_status": _array(
                    _object(
                        {
                            "version": text,
                            "state": {"type": "string", "enum": ["LOADING", "AVAILABLE", "END"]},
                            "status": _object({"error_code": text, "error_message": text}, "error_code", "error_message"),
                        },
                        "version",
                        "state",
                        "status",
                    )
                ),
            },
            "name",
            "ready",
            "model_version_status",
        ),
        "SignatureDef": _struct(
            model_spec=_struct(name=text, signature_name=text, version=text),
            metadata=_struct(signature_def=_struct(signature_def=_by_name(_ref("Signature")))),
        ),
        "Signature": _struct(inputs=_by_name(_ref("TensorInfo")), outputs=_by_name(_ref("TensorInfo")), method_name=text),
        "TensorInfo": _struct(
            name=text,
            dtype={"type": "string", "pattern": "^DT_"},
            tensor_shape=_struct(
                dim=_array(_struct(size={"type": "string", "pattern": "^-?[0-9]+$"}, name=text)), unknown_rank=yes
            ),
        ),
        "Config": _object(
            {
                "name": text,
                "platform": text,
                "backend": text,
                "max_batch_size": {**size, "description": "0: its tensors have no batch dimension."},
                "input": _array(_ref("TensorConfig")),
                "output": _array(_ref("TensorConfig")),
                "dynamic_batching": _object({"max_queue_delay_microseconds": size}),
            },
            "name",
            "platform",
            "backend",
            "max_batch_size",
            "input",
            "output",
        ),
        "TensorConfig": _object(
            {
                "name": text,
                "data_type": {"type": "string", "pattern": "^TYPE_"},
                "dims": {**_array({"type": "integer", "minimum": -1}), "description": "Without the batch dimension."},
            },
            "name",
            "data_type",
            "dims",
        ),
        "Statistics": _object({"model_stats": _array(_ref("ModelStatistics"))}, "model_stats"),
        "ModelStatistics": _struct(
            name=text,
            version=text,
            last_inference={**size, "description": "Milliseconds since the epoch; 0: none."},
            inference_count={**size, "description": "Rows."},
            execution_count={**size, "description": "Runs; one can be of several requests."},
            inference_stats=_struct(
                success=duration,
                fail=duration,
                queue=duration,
                compute_input=duration,
                compute_infer=duration,
                compute_output=duration,
                cache_hit=duration,
                cache_miss=duration,
            ),
            batch_stats=_array(_struct(batch_size=size, compute_input=duration, compute_infer=duration, compute_output=duration)),
        ),
        "Duration": _struct(count=size, ns=size),
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
                    "description": "By row: a record by input name, or the values in the signature's order.",
                },
                "inputs": {
                    "type": ["object", "array"],
                    "description": "By column: whole tensors by input name, or that of the only input.",
                },
                "signature_name": {"description": "Ignored."},
            },
            oneOf=[{"required": ["instances"]}, {"required": ["inputs"]}],
            example={"instances": [{"bill_length_mm": 39.1, "island": "Torgersen"}]},
        ),
        "PredictResponse": _object(
            {
                "predictions": {"type": "array", "description": "For each instance."},
                "outputs": {"type": ["object", "array"], "description": "As the inputs came: by column."},
            },
            oneOf=[{"required": ["predictions"]}, {"required": ["outputs"]}],
        ),
        "State": _object({"name": text, "version": text, "state": text, "reason": text}, "name", "version", "state"),
        "Error": _object({"error": text, "reason": text, "stage": text, "model": text, "pair": text}, "error"),
    }
