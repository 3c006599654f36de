"""A model of a running server as a loaded predictor: it blocks, so that what runs bundles can run it too."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

from splitserve.arrays import from_array, to_array
from splitserve.oip.messages import InferRequest, ModelMetadata, deadline_after
from splitserve.remote.inference import RemoteInference
from splitserve.signature import TensorSpec, is_row_wise
from splitserve.tensors import Tensor

T = TypeVar("T")

MAX_REQUEST_BYTES = 3 * 1024**2
"""More rows than this are sent in several requests: 4 MiB is the default limit of gRPC servers."""


class RunningModel:
    """A model of any server of the protocol, over gRPC. Use it inside its ``with``.

    Args:
        remote: the server, not yet connected.
        model: its name there.
        version: as requests name it; "" leaves the choice to the server.
        timeout_s: of each request.

    Raises:
        SplitserveError: on entering: the server cannot be reached, or does not have the model.
    """

    def __init__(self, remote: RemoteInference, model: str, version: str = "", *, timeout_s: float = 60.0) -> None:
        self._remote = remote
        self._model = model
        self._version = version
        self._timeout_s = timeout_s
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="running-model", daemon=True)
        self._metadata = ModelMetadata(model, (), "", (), ())

    def __enter__(self) -> RunningModel:
        self._thread.start()
        try:
            self._run(self._remote.__aenter__())
            self._metadata = self._run(self._remote.metadata(self._model, self._version))
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()

    @property
    def inputs(self) -> Sequence[TensorSpec]:
        """As its metadata says; empty if it says nothing."""
        return self._metadata.inputs

    @property
    def outputs(self) -> Sequence[TensorSpec]:
        """As its metadata says; empty if it says nothing."""
        return self._metadata.outputs

    @property
    def properties(self) -> Mapping[str, str]:
        """Of its metadata."""
        return self._metadata.properties

    def infer(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Tensors (n_rows, …) -> outputs (n_rows, …).

        Raises:
            SplitserveError: raised by the server, or it cannot be reached.
        """
        n_rows, n_bytes = inputs[0].n_rows, sum(len(tensor.raw) for tensor in inputs)
        n_requests = min(-(-n_bytes // MAX_REQUEST_BYTES), n_rows) if is_row_wise(self.inputs, self.outputs) else 1
        if n_requests <= 1:
            return self._infer(tuple(inputs))
        size = -(-n_rows // n_requests)
        parts = [self._infer(_rows(inputs, first, first + size)) for first in range(0, n_rows, size)]
        return tuple(_joined([part[number] for part in parts]) for number in range(len(parts[0])))

    def _infer(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        request = InferRequest(self._model, inputs, self._version, deadline=deadline_after(self._timeout_s))
        return self._run(self._remote.infer(request)).outputs

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _close(self) -> None:
        self._run(self._remote.__aexit__(None, None, None))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _rows(tensors: Sequence[Tensor], first: int, last: int) -> tuple[Tensor, ...]:
    return tuple(from_array(tensor.name, to_array(tensor)[first:last], tensor.datatype) for tensor in tensors)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    shape = (sum(part.n_rows for part in parts), *parts[0].shape[1:])
    return Tensor(parts[0].name, parts[0].datatype, shape, b"".join(part.raw for part in parts))
