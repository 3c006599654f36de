"""One call of ``infer``: signature, columns, chunks, requests, answer.

Yields steps (see `splitserve.client.steps`); the client decides how many chunks are in flight at once. Knows no transport.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

from splitserve.arrays import Array
from splitserve.client.answer import Answer, Text, outputs_of
from splitserve.client.chunks import can_be_cut, cut, has_rows, join
from splitserve.client.encoding import Extra, InputColumn, index_of, is_table, to_columns
from splitserve.client.retries import RETRY_ON, Retries
from splitserve.client.steps import Ask, Once, Steps, attempts
from splitserve.errors import DeadlineExceeded, InvalidInput, Overloaded, SplitserveError, Unavailable
from splitserve.oip.classification import LABELS, labels_of
from splitserve.oip.ignored_inputs import ignored_inputs
from splitserve.oip.input_columns import input_columns
from splitserve.oip.messages import DEFAULT, InferRequest, InferResponse, ModelMetadata, Parameter, RequestedOutput

Outputs = dict[str, Array]

T = TypeVar("T")

_ROW = re.compile(r"\brow (\d+)\b")


class RequestOptions(NamedTuple):
    """What a call says of its requests, beside their inputs.

    ``version``: "" for the server's choice. ``outputs``: names of those requested; () for all. ``timeout_s``: of each request,
    including its retries; None: the client's.
    """

    version: str = ""
    outputs: Sequence[str] = ()
    parameters: Mapping[str, Parameter] | None = None
    request_id: str = ""
    headers: Mapping[str, str] | None = None
    extra: Extra = "error"
    timeout_s: float | None = None


Known = ModelMetadata | SplitserveError
"""A model's signature, or why it is unknown."""


class Core:
    """What a client keeps between calls: timeout, retry budget, known signatures.

    Args:
        timeout_s: of a request, unless the call says otherwise; None or infinity: no limit.
        max_attempts: of a request.
        retry_on: the errors after which a request is retried.
        text: what text outputs become.
        clock: monotonic, in seconds.
    """

    def __init__(
        self,
        timeout_s: float | None,
        max_attempts: int,
        retry_on: Collection[type[SplitserveError]] = RETRY_ON,
        text: Text = str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if text not in (str, bytes):
            raise ValueError(f"text: expected str or bytes, got {text!r}")
        self.text: Text = text
        self._timeout_s = float("inf") if timeout_s is None else timeout_s
        self._retries = Retries(max_attempts, retry_on)
        self._clock = clock
        self._signatures: dict[tuple[str, str], ModelMetadata] = {}
        self._fetched: dict[tuple[str, str], tuple[int, Known]] = {}
        """The latest result of fetching a signature, and how many there were."""
        self.deadline_after(None)

    def forked(self) -> None:
        """In a forked child: another thread of the parent may have held a lock."""
        self._retries.forked()

    def deadline_after(self, timeout_s: float | None) -> float:
        """The deadline of a request that begins now, on the clock; infinity: none.

        Raises:
            ValueError: the timeout is not positive.
        """
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        given: Any = timeout_s
        if isinstance(given, str) or not given > 0:
            raise ValueError(f"timeout_s: expected more than 0 seconds, got {timeout_s!r}")
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

    def fetch_signature(self, model: str, version: str, deadline: float) -> Steps[Known]:
        """The current signature, or why the server gives none: the inference may work all the same.

        Calls that want it at the same time share one request.

        Raises:
            SplitserveError: the server cannot be reached or accepts no calls, so that sending the inputs is futile.
        """
        n_before, _ = self._fetched.get((model, version), (0, None))
        known: Known = yield Once((model, version), partial(self._fetch, model, version, n_before, deadline))
        return known

    def _fetch(self, model: str, version: str, n_before: int, deadline: float) -> Steps[Known]:
        n_fetched, latest = self._fetched.get((model, version), (0, None))
        if latest is not None and n_fetched != n_before:  # by another call, while this one waited
            return latest
        known: Known
        try:
            known = yield from self.ask(Ask("model_metadata", model, version), deadline)
        except (Unavailable, Overloaded, DeadlineExceeded):
            raise
        except SplitserveError as error:
            self._signatures.pop((model, version), None)
            known = error
        if isinstance(known, ModelMetadata):
            self._signatures[model, version] = known
        self._fetched[model, version] = (n_fetched + 1, known)
        return known

    def with_signature(self, model: str, version: str, send: Callable[[Known], Steps[T]], deadline: float) -> Steps[T]:
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
        if isinstance(signature, SplitserveError) or signature.inputs == known.inputs:
            raise refused
        return (yield from send(signature))


def columns_for(inputs: Any, known: Known, extra: Extra = "error") -> list[InputColumn]:
    """The inputs of a request to a model.

    Raises:
        InvalidInput: as `to_columns`.
        SplitserveError: the signature is unknown for this reason, and the inputs cannot be encoded without it.
    """
    if isinstance(known, ModelMetadata):
        return to_columns(inputs, known.inputs, ignored_inputs(known), extra=extra, columns=input_columns(known))
    try:
        return to_columns(inputs, None)
    except InvalidInput as error:
        raise type(known)(known.message, stage=known.stage, model=known.model, pair=known.pair) from error


class InferCall:
    """One call of ``infer``.

    `begin` first; then `chunk` for each of `rest`, in any order; then `answer`.

    Args:
        core: the client's.
        model: its name.
        inputs: as `splitserve.client.encoding.to_columns` takes them.
        options: of its requests; all chunks go to the version that answered the first.
        chunk_rows: rows of a request at most; 0: no limit; None: about 1 MiB of rows, if they are independent.
    """

    def __init__(self, core: Core, model: str, inputs: Any, options: RequestOptions, *, chunk_rows: int | None) -> None:
        if not isinstance(model, str) or not model:
            raise ValueError(f"model: expected the name of a model, got {model!r}")
        if chunk_rows is not None and chunk_rows < 0:
            raise ValueError(f"chunk_rows: expected 0 or more, got {chunk_rows}")
        self._core = core
        self._model = model
        self._inputs = inputs
        self._options = options
        self._version = options.version
        if options.extra not in ("error", "drop"):
            raise ValueError(f'extra: expected "error" or "drop", got {options.extra!r}')
        self._outputs = requested(options.outputs)
        self._parameters = checked(options.parameters)
        self._chunk_rows = chunk_rows
        self._timeout_s = options.timeout_s
        self._columns: list[InputColumn] = []
        self._chunks: list[range] = [range(0)]
        self._model_name = model
        self._labels: dict[str, list[str]] = {}
        self._id = ""
        core.deadline_after(options.timeout_s)

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

    def _first(self, deadline: float, known: Known) -> Steps[Outputs]:
        self._columns = columns_for(self._inputs, known, self._options.extra)
        signature = known if isinstance(known, ModelMetadata) else None
        self._chunks = self._cut(signature)
        response = yield from self._send(self._chunks[0], deadline)
        asked, self._version = self._version, response.version or self._version
        self._model_name = response.model or self._model
        self._id = response.id or self._options.request_id
        outputs = outputs_of(response, self._core.text)
        self._labels = yield from self._labels_of(outputs, signature, asked, deadline)
        return outputs

    def _labels_of(
        self, outputs: Outputs, signature: ModelMetadata | None, asked: str, deadline: float
    ) -> Steps[dict[str, list[str]]]:
        """What the columns of each output are, by the metadata of the version that answered."""
        if signature is None or LABELS not in signature.properties:
            return {}
        known: Known | None = signature
        if self._version not in (asked, signature.properties.get(DEFAULT)):
            known = self._core.known_signature(self._model, self._version)
            if known is None:
                known = yield from self._core.fetch_signature(self._model, self._version, deadline)
        if not isinstance(known, ModelMetadata):
            return {}
        found = {name: labels_of(known, name) for name in outputs}
        return {
            name: labels for name, labels in found.items() if outputs[name].ndim == 2 and outputs[name].shape[1] == len(labels)
        }

    def _cut(self, signature: ModelMetadata | None) -> list[range]:
        can_cut = can_be_cut(self._columns)
        if can_cut and (self._chunk_rows or (self._chunk_rows is None and (is_table(self._inputs) or has_rows(signature)))):
            return cut(self._columns, self._chunk_rows or 0)
        return [range(len(self._columns[0].array) if can_cut else 0)]

    def chunk(self, rows: range) -> Steps[Outputs]:
        """Infer some rows.

        Raises:
            SplitserveError: the message names the rows.
        """
        response = yield from self._send(rows, self._core.deadline_after(self._timeout_s))
        return outputs_of(response, self._core.text)

    def _send(self, rows: range, deadline: float) -> Steps[InferResponse]:
        part = slice(rows.start, rows.stop) if len(self._chunks) > 1 else None
        try:
            request = InferRequest(
                self._model,
                tuple(column.tensor(part) for column in self._columns),
                version=self._version,
                outputs=self._outputs,
                id=self._options.request_id,
                parameters=self._parameters,
            )
            ask = Ask("infer", self._model, self._version, request, headers=headers_of(self._options))
            response: InferResponse = yield from self._core.ask(ask, deadline)
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
        index = index_of(self._inputs)
        return Answer(
            join(parts, self._chunks),
            model=self._model_name,
            version=self._version,
            index=index,
            labels=self._labels,
            id=self._id,
        )


def requested(outputs: Sequence[str]) -> tuple[RequestedOutput, ...]:
    """The outputs of a request; one name is one output."""
    return tuple(RequestedOutput(name) for name in ((outputs,) if isinstance(outputs, str) else outputs or ()))


def checked(parameters: Mapping[str, Parameter] | None) -> dict[str, Parameter]:
    """The parameters of a request; numpy's scalars as Python's.

    Raises:
        InvalidInput: one is of a type that the protocol does not have.
    """
    plain: dict[str, Parameter] = {}
    for name, value in (parameters or {}).items():
        scalar = value.item() if isinstance(value, np.generic) else value
        if not isinstance(scalar, bool | int | float | str):
            raise InvalidInput(f'parameter "{name}": expected bool, int, float or str, got {type(value).__name__}')
        plain[name] = scalar
    return plain


def headers_of(options: RequestOptions) -> Mapping[str, str] | None:
    """The headers of a call's requests; its id is one, so that every server and proxy on the way can log it."""
    if options.request_id.isascii() and options.request_id.isprintable() and options.request_id:
        return {"x-request-id": options.request_id, **(options.headers or {})}
    return options.headers


def _at_rows(error: SplitserveError, rows: range) -> SplitserveError:
    """The error of a chunk; rows that its message names are those of the whole table."""
    message = _ROW.sub(lambda found: f"row {int(found[1]) + rows.start}", error.message)
    message = f"rows {rows.start} to {rows.stop - 1}: {message}"
    return type(error)(message, stage=error.stage, model=error.model, pair=error.pair)
