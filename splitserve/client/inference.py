"""One call of ``infer``: signature, columns, chunks, requests, answer.

Yields steps (see `splitserve.client.steps`); the client decides how many chunks are in flight at once. Knows no transport.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from splitserve.arrays import Array
from splitserve.client.answer import Answer, outputs_of
from splitserve.client.chunks import can_be_cut, cut, has_rows, join
from splitserve.client.encoding import InputColumn, is_frame, to_columns
from splitserve.client.retries import Retries
from splitserve.client.steps import Ask, Steps, attempts
from splitserve.errors import DeadlineExceeded, InvalidInput, Overloaded, SplitserveError, Unavailable
from splitserve.oip.classification import LABELS, labels_of
from splitserve.oip.ignored_inputs import ignored_inputs
from splitserve.oip.messages import DEFAULT, InferRequest, InferResponse, ModelMetadata, Parameter, RequestedOutput

Outputs = dict[str, Array]

T = TypeVar("T")


class Core:
    """What a client keeps between calls: timeout, retry budget, known signatures.

    Args:
        timeout_s: of a request, unless the call says otherwise.
        max_attempts: of a request.
        clock: monotonic, in seconds.
    """

    def __init__(self, timeout_s: float, max_attempts: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout_s = timeout_s
        self._retries = Retries(max_attempts)
        self._clock = clock
        self._signatures: dict[tuple[str, str], ModelMetadata] = {}
        self.deadline_after(None)

    def deadline_after(self, timeout_s: float | None) -> float:
        """The deadline of a request that begins now, on the clock.

        Raises:
            ValueError: the timeout is not positive.
        """
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        if not timeout_s > 0:
            raise ValueError(f"timeout_s: expected more than 0 seconds, got {timeout_s}")
        return self._clock() + timeout_s

    def now(self) -> float:
        """The time on the clock."""
        return self._clock()

    def ask(self, ask: Ask, deadline: float) -> Steps[Any]:
        """Ask, with retries."""
        return attempts(ask, deadline, self._retries, self._clock)

    def known_signature(self, model: str, version: str) -> ModelMetadata | None:
        """The signature, if it was fetched before."""
        return self._signatures.get((model, version))

    def fetch_signature(self, model: str, version: str, deadline: float) -> Steps[ModelMetadata | None]:
        """The current signature; None if the server has none to give: the inference will then report what is wrong.

        Raises:
            SplitserveError: the server cannot be reached or accepts no calls, so that sending the inputs is futile.
        """
        try:
            signature: ModelMetadata = yield from self.ask(Ask("model_metadata", model, version), deadline)
        except (Unavailable, Overloaded, DeadlineExceeded):
            raise
        except SplitserveError:
            self._signatures.pop((model, version), None)
            return None
        self._signatures[model, version] = signature
        return signature

    def with_signature(
        self, model: str, version: str, send: Callable[[ModelMetadata | None], Steps[T]], deadline: float
    ) -> Steps[T]:
        """What ``send`` returns, which encodes inputs by a signature. If a known one no longer fits, it is fetched again.

        Raises:
            InvalidInput: the inputs cannot be encoded, or the server refuses them, with the current signature.
        """
        known = self.known_signature(model, version)
        if known is None:
            return (yield from send((yield from self.fetch_signature(model, version, deadline))))
        try:
            return (yield from send(known))
        except InvalidInput as error:
            refused = error
        signature = yield from self.fetch_signature(model, version, deadline)
        if signature is None or signature.inputs == known.inputs:
            raise refused
        return (yield from send(signature))


def columns_for(inputs: Any, signature: ModelMetadata | None) -> list[InputColumn]:
    """The inputs of a request to a model; None: its signature is unknown.

    Raises:
        InvalidInput: as `to_columns`.
    """
    return to_columns(inputs, signature.inputs, ignored_inputs(signature)) if signature else to_columns(inputs, None)


class InferCall:
    """One call of ``infer``.

    `begin` first; then `chunk` for each of `rest`, in any order; then `answer`.

    Args:
        core: the client's.
        model: its name.
        inputs: as `splitserve.client.encoding.to_columns` takes them.
        version: "" for the server's choice; all chunks go to the version that answered the first.
        outputs: names of the requested outputs; () for all.
        parameters: of the request.
        chunk_rows: rows of a request at most; 0: no limit; None: about 1 MiB of rows, if they are independent.
        timeout_s: of each request, including its retries; None: the client's.
    """

    def __init__(
        self,
        core: Core,
        model: str,
        inputs: Any,
        *,
        version: str,
        outputs: Sequence[str],
        parameters: Mapping[str, Parameter] | None,
        chunk_rows: int | None,
        timeout_s: float | None,
    ) -> None:
        if chunk_rows is not None and chunk_rows < 0:
            raise ValueError(f"chunk_rows: expected 0 or more, got {chunk_rows}")
        self._core = core
        self._model = model
        self._inputs = inputs
        self._version = version
        self._outputs = tuple(RequestedOutput(name) for name in outputs)
        self._parameters = parameters or {}
        self._chunk_rows = chunk_rows
        self._timeout_s = timeout_s
        self._columns: list[InputColumn] = []
        self._chunks: list[range] = [range(0)]
        self._model_name = model
        self._labels: dict[str, list[str]] = {}

    @property
    def rest(self) -> list[range]:
        """The rows of each request after the first."""
        return self._chunks[1:]

    @property
    def n_rows(self) -> int:
        """Rows of the whole table."""
        return self._chunks[-1].stop

    def begin(self) -> Steps[Outputs]:
        """Get the signature, encode the inputs, send the first chunk. A known signature that no longer fits is fetched again.

        Raises:
            SplitserveError: raised by the server.
            InvalidInput: the inputs cannot be encoded.
        """
        deadline = self._core.deadline_after(self._timeout_s)
        send = partial(self._first, deadline)
        return (yield from self._core.with_signature(self._model, self._version, send, deadline))

    def _first(self, deadline: float, signature: ModelMetadata | None) -> Steps[Outputs]:
        self._columns = columns_for(self._inputs, signature)
        self._chunks = self._cut(signature)
        response = yield from self._send(self._chunks[0], deadline)
        asked, self._version = self._version, response.version or self._version
        self._model_name = response.model or self._model
        outputs = outputs_of(response)
        self._labels = yield from self._labels_of(outputs, signature, asked, deadline)
        return outputs

    def _labels_of(
        self, outputs: Outputs, signature: ModelMetadata | None, asked: str, deadline: float
    ) -> Steps[dict[str, list[str]]]:
        """What the columns of each output are, by the metadata of the version that answered."""
        if signature is None or LABELS not in signature.properties:
            return {}
        known: ModelMetadata | None = signature
        if self._version not in (asked, signature.properties.get(DEFAULT)):
            known = self._core.known_signature(self._model, self._version)
            if known is None:
                known = yield from self._core.fetch_signature(self._model, self._version, deadline)
        if known is None:
            return {}
        found = {name: labels_of(known, name) for name in outputs}
        return {
            name: labels for name, labels in found.items() if outputs[name].ndim == 2 and outputs[name].shape[1] == len(labels)
        }

    def _cut(self, signature: ModelMetadata | None) -> list[range]:
        is_table = can_be_cut(self._columns)
        if is_table and (self._chunk_rows or (self._chunk_rows is None and (is_frame(self._inputs) or has_rows(signature)))):
            return cut(self._columns, self._chunk_rows or 0)
        return [range(len(self._columns[0].array) if is_table else 0)]

    def chunk(self, rows: range) -> Steps[Outputs]:
        """Infer some rows.

        Raises:
            SplitserveError: the message names the rows.
        """
        response = yield from self._send(rows, self._core.deadline_after(self._timeout_s))
        return outputs_of(response)

    def _send(self, rows: range, deadline: float) -> Steps[InferResponse]:
        part = slice(rows.start, rows.stop) if len(self._chunks) > 1 else None
        try:
            request = InferRequest(
                self._model,
                tuple(column.tensor(part) for column in self._columns),
                version=self._version,
                outputs=self._outputs,
                parameters=self._parameters,
            )
            response: InferResponse = yield from self._core.ask(Ask("infer", self._model, self._version, request), deadline)
        except SplitserveError as error:
            if part is None:
                raise
            raise _at_rows(error, rows) from error
        return response

    def answer(self, parts: Sequence[Outputs]) -> Answer:
        """The answer, from the outputs of all chunks in order.

        Raises:
            PairMismatch: the outputs do not have as many rows as were sent.
        """
        index = self._inputs.index if is_frame(self._inputs) else None
        return Answer(join(parts, self._chunks), model=self._model_name, version=self._version, index=index, labels=self._labels)


def _at_rows(error: SplitserveError, rows: range) -> SplitserveError:
    message = f"rows {rows.start} to {rows.stop - 1}: {error.message}"
    return type(error)(message, stage=error.stage, model=error.model, pair=error.pair)
