"""A client of the protocol over REST, with no more than verification needs. Tensors travel as binary data, so no bit is lost."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

import msgspec

from splitserve import errors
from splitserve.arrays import Array, from_array, to_array
from splitserve.errors import InvalidInput, PairMismatch, SplitserveError, Unavailable
from splitserve.oip import ModelMetadata
from splitserve.signature import TensorSpec
from splitserve.tensors import Tensor

_HEADER_LENGTH = "Inference-Header-Content-Length"


class _Spec(msgspec.Struct):
    name: str
    datatype: str
    shape: tuple[int, ...]


class _Metadata(msgspec.Struct):
    name: str
    inputs: tuple[_Spec, ...]
    outputs: tuple[_Spec, ...]
    versions: tuple[str, ...] = ()
    platform: str = ""


class _Output(_Spec):
    parameters: dict[str, Any] = {}


class _Answer(msgspec.Struct):
    outputs: tuple[_Output, ...]


class _Failure(msgspec.Struct):
    error: str = ""
    reason: str = ""
    stage: str = ""


class RestClient:
    """A system at a URL, e.g. ``http://127.0.0.1:8000``."""

    def __init__(self, url: str, *, timeout_s: float = 30.0) -> None:
        self._url = url.rstrip("/")
        self._timeout_s = timeout_s

    def infer(self, model: str, inputs: Mapping[str, Any], *, version: str = "") -> dict[str, Array]:
        """As `splitserve.client.Client.infer`."""
        tensors = [from_array(name, array) for name, array in inputs.items()]
        head = msgspec.json.encode(
            {
                "inputs": [
                    {
                        "name": tensor.name,
                        "datatype": tensor.datatype,
                        "shape": tensor.shape,
                        "parameters": {"binary_data_size": len(tensor.raw)},
                    }
                    for tensor in tensors
                ],
                "parameters": {"binary_data_output": True},
            }
        )
        body = b"".join((head, *(tensor.raw for tensor in tensors)))
        headers, answer = self._call(f"{_path(model, version)}/infer", body, {_HEADER_LENGTH: str(len(head))})
        return _arrays(answer, headers.get(_HEADER_LENGTH))

    def metadata(self, model: str, version: str = "") -> ModelMetadata:
        """As `splitserve.client.Client.metadata`."""
        _, body = self._call(_path(model, version))
        try:
            found = msgspec.json.decode(body, type=_Metadata)
        except msgspec.DecodeError as error:
            raise PairMismatch(f"the metadata of {model} is broken: {error}") from error
        inputs, outputs = (
            tuple(TensorSpec(spec.name, spec.datatype, spec.shape) for spec in specs) for specs in (found.inputs, found.outputs)
        )
        return ModelMetadata(found.name, found.versions, found.platform, inputs, outputs)

    def close(self) -> None:
        """There is no connection that stays open."""

    def _call(
        self, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[Mapping[str, str], bytes]:
        request = urllib.request.Request(self._url + path, body, dict(headers or {}))  # noqa: S310 - the user's own URL
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_s) as answer:  # noqa: S310
                return answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            raise _failure(error.code, error.read()) from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise Unavailable(f"{self._url} can not be reached: {reason}") from error


def _path(model: str, version: str) -> str:
    path = f"/v2/models/{urllib.parse.quote(model, safe='')}"
    return f"{path}/versions/{urllib.parse.quote(version, safe='')}" if version else path


def _failure(status: int, body: bytes) -> SplitserveError:
    try:
        failure = msgspec.json.decode(body, type=_Failure)
    except msgspec.DecodeError:
        failure = _Failure()
    return errors.from_wire("", failure.error or f"HTTP status {status}", failure.reason, {"stage": failure.stage})


def _arrays(body: bytes, header_length: str | None) -> dict[str, Array]:
    end = int(header_length) if header_length else len(body)
    arrays = {}
    try:
        for output in msgspec.json.decode(body[:end], type=_Answer).outputs:
            start, end = end, end + int(output.parameters.get("binary_data_size", 0))
            arrays[output.name] = to_array(Tensor(output.name, output.datatype, output.shape, body[start:end]))
    except (msgspec.DecodeError, InvalidInput) as error:
        raise PairMismatch(f"the answer is broken: {error}") from error
    return arrays
