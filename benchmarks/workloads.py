"""Workloads: rows for a model in each form of the protocol, and the original pipeline's answers to them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from splitserve.api.inference import inference_pb2 as pb
from splitserve.arrays import DTYPES, Array, from_array, to_array
from splitserve.oip import protobuf
from splitserve.oip.messages import InferRequest
from splitserve.tensors import Tensor

N_ROWS = 64
"""Rows that are sent at once when answers are checked."""

JSON_HEADERS = (("content-type", "application/json"),)


class RestBody(NamedTuple):
    """A REST request: its bytes and headers."""

    content: bytes
    headers: tuple[tuple[str, str], ...]


class Workload(NamedTuple):
    """Rows for one model.

    Attributes:
        model: what clients call it.
        rows: one request each, arrays by input name, leading dimension 1.
        output: the output that is compared.
        expected: what it must be, (n_rows, …); for labels, ``bytes``.
        has_json: whether JSON can carry the rows in reasonable size.
    """

    model: str
    rows: tuple[Mapping[str, Array], ...]
    output: str
    expected: Array
    has_json: bool = True

    def tensors(self, index: int) -> tuple[Tensor, ...]:
        return tuple(from_array(name, array) for name, array in self.rows[index % len(self.rows)].items())

    def bytes_in(self) -> int:
        """Bytes of one row's tensors."""
        return sum(len(tensor.raw) for tensor in self.tensors(0))

    def rest_json(self, index: int) -> RestBody:
        inputs = [_json_tensor(tensor, self.rows[index % len(self.rows)][tensor.name]) for tensor in self.tensors(index)]
        return RestBody(json.dumps({"inputs": inputs}).encode(), JSON_HEADERS)

    def rest_binary(self, index: int) -> RestBody:
        """Source: Triton, "Binary Tensor Data Extension"."""
        tensors = self.tensors(index)
        inputs = [_described(tensor, parameters={"binary_data_size": len(tensor.raw)}) for tensor in tensors]
        header = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
        headers = (("content-type", "application/octet-stream"), ("inference-header-content-length", str(len(header))))
        return RestBody(b"".join((header, *(tensor.raw for tensor in tensors))), headers)

    def grpc(self, index: int, request_id: str = "") -> bytes:
        """A ModelInferRequest; raw contents."""
        request = InferRequest(model=self.model, id=request_id, inputs=self.tensors(index))
        return protobuf.encode_request(request).SerializeToString()

    def is_right(self, index: int, answer: Array | None) -> bool:
        """Whether an answer's `output` is the original's for that row."""
        expected = self.expected[index % len(self.rows)]
        if answer is None or answer.size != expected.size:
            return False
        got = answer.reshape(expected.shape)
        if expected.dtype.kind == "O":
            return bool((got == expected).all())
        return bool(np.allclose(got, expected, rtol=1e-4, atol=1e-4))

    def from_rest(self, body: bytes, header_length: int | None) -> Array | None:
        """The `output` of a REST answer, None if it is not there."""
        if header_length is None:
            outputs = {output["name"]: output for output in json.loads(body)["outputs"]}
            found = outputs.get(self.output)
            return None if found is None else np.array(_objects(found["data"], found["datatype"]))
        at = header_length
        for output in json.loads(body[:header_length])["outputs"]:
            size = output["parameters"]["binary_data_size"]
            if output["name"] == self.output:
                tensor = Tensor(output["name"], output["datatype"], tuple(output["shape"]), body[at : at + size])
                return to_array(tensor)
            at += size
        return None

    def from_grpc(self, message: bytes) -> Array | None:
        """The `output` of a ModelInferResponse, None if it is not there."""
        outputs = protobuf.decode_response(pb.ModelInferResponse.FromString(message)).outputs
        return next((to_array(tensor) for tensor in outputs if tensor.name == self.output), None)


def _objects(data: Sequence[Any], datatype: str) -> Array:
    if datatype == "BYTES":
        return np.array([str(element).encode() for element in data], dtype=np.object_)
    return np.array(data, dtype=DTYPES[datatype])


def _described(tensor: Tensor, **rest: Any) -> dict[str, Any]:
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape), **rest}


def _json_tensor(tensor: Tensor, array: Array) -> dict[str, Any]:
    return _described(tensor, data=array.ravel().tolist())


def grpc_frame(message: bytes) -> bytes:
    """A message as gRPC sends it. Source: gRPC over HTTP/2, "Length-Prefixed-Message"."""
    return b"\0" + len(message).to_bytes(4, "big") + message
