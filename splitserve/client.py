"""The client: numpy arrays, lists or a DataFrame in, numpy arrays out, over gRPC."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import grpc
import numpy as np

from splitserve import oip_grpc
from splitserve.api.inference import inference_pb2 as pb
from splitserve.arrays import Array, from_array, to_array
from splitserve.oip import InferRequest, ModelMetadata, RequestedOutput
from splitserve.remote import MAX_MESSAGE_BYTES, METHODS, translate
from splitserve.replicas import channel_options
from splitserve.tensors import Tensor
from splitserve.tls import ClientTls, bearer

Inputs = Mapping[str, Any]
"""Or a DataFrame, which is one as far as it is read here."""


class Client:
    """A connection to a proxy, or to any server of the Open Inference Protocol over gRPC.

    Args:
        target: gRPC name, e.g. ``127.0.0.1:8001``.
        timeout_s: how long a call may take.
        max_message_bytes: the largest message sent or taken.
        tls: files of the connection, read once; None: plain text.
        token: shown with every call, where the server asks for one. Over plain text, anyone on the way reads it.
    """

    def __init__(
        self,
        target: str = "127.0.0.1:8001",
        *,
        timeout_s: float = 30.0,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        tls: ClientTls | None = None,
        token: str = "",
    ) -> None:
        self._timeout_s = timeout_s
        self._metadata = bearer(token)
        options = channel_options(max_message_bytes)
        if tls is None:
            self._channel = grpc.insecure_channel(target, options=options)
        else:
            self._channel = grpc.secure_channel(target, tls.credentials(), options=[*options, *tls.options()])

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def infer(self, model: str, inputs: Inputs, *, version: str = "", outputs: Sequence[str] = ()) -> dict[str, Array]:
        """Infer.

        Args:
            model: its name.
            inputs: by input name, an array (n_rows, …) or a list; or a DataFrame, each column an input. In text, None and NaN are
                missing values.
            version: a pair, ``"K.M"``; the server's choice by default.
            outputs: names of those wanted; all by default.

        Returns:
            Arrays by output name; BYTES as objects of type ``bytes``.

        Raises:
            SplitserveError: the subclass says what, see `splitserve.errors`.
        """
        tensors = tuple(_to_tensor(str(name), inputs[name]) for name in inputs)
        wanted = tuple(RequestedOutput(name) for name in outputs)
        request = InferRequest(model, tensors, version=version, outputs=wanted)
        response = oip_grpc.decode_response(self._call("ModelInfer", oip_grpc.encode_request(request)))
        return {tensor.name: to_array(tensor) for tensor in response.outputs}

    def metadata(self, model: str, version: str = "") -> ModelMetadata:
        """Signature of a model.

        Raises:
            SplitserveError: as `infer`.
        """
        return oip_grpc.decode_metadata(self._call("ModelMetadata", pb.ModelMetadataRequest(name=model, version=version)))

    def is_ready(self) -> bool:
        """Whether at least one model can be inferred now.

        Raises:
            SplitserveError: the server can not be reached.
        """
        return bool(self._call("ServerReady", pb.ServerReadyRequest()).ready)

    def _call(self, method: str, request: Any) -> Any:
        request_type, response_type = METHODS[method]
        call = self._channel.unary_unary(
            f"/{oip_grpc.SERVICE}/{method}",
            request_serializer=request_type.SerializeToString,
            response_deserializer=response_type.FromString,
        )
        try:
            return call(request, timeout=self._timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise translate(error, "server") from error


def _to_tensor(name: str, values: Any) -> Tensor:
    array = np.asarray(values)
    if array.dtype.kind == "O":
        array = np.frompyfunc(lambda element: "" if element is None or element != element else element, 1, 1)(array)
    if array.dtype.kind == "U":
        array = array.astype(np.object_)
    return from_array(name, array)
