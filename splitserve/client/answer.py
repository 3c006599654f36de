"""The result of `Client.infer`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from splitserve.arrays import Array, objects, to_array
from splitserve.errors import InvalidInput, PairMismatch
from splitserve.needed import needed
from splitserve.oip.messages import InferResponse

if TYPE_CHECKING:
    import pandas as pd

Text = type[str] | type[bytes]
"""What text outputs become."""

Names = Mapping[str, Sequence[str]] | None
"""Of the columns, by output."""


class Answer(dict[str, Array]):
    """Arrays (n_rows, ...) by output name, which can be written to; text as objects of type ``str``.

    ``model`` and ``version`` are those that answered; with splitserve the version is a pair, ``"K.M"``. ``id`` is the request's.

    Example::

        answer = client.infer("penguins", frame)
        answer["label"][0]                  # "Adelie"
        answer.to_frame()                   # label, probabilities_Adelie, probabilities_Chinstrap, …
    """

    def __init__(
        self,
        outputs: Mapping[str, Array],
        *,
        model: str,
        version: str,
        index: Any = None,
        labels: Mapping[str, Sequence[str]] | None = None,
        id: str = "",
    ) -> None:
        super().__init__(outputs)
        self.model = model
        self.version = version
        self.id = id
        self.labels: dict[str, list[str]] = {output: list(names) for output, names in (labels or {}).items()}
        """By output, what its columns are: the classes of probabilities, in their order; empty if the server does not say."""
        self._index = index

    def __repr__(self) -> str:
        return f"<Answer of {self.model} {self.version}: {dict(self)!r}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (dict(self), self.model, self.version, self._index, self.labels, self.id)

    def to_frame(self, names: Names = None) -> pd.DataFrame:
        """The outputs as a pandas DataFrame, with the index of the DataFrame that was sent, if any.

        An output with one value per row becomes a column of its name, one with k values per row k columns: ``name_LABEL`` for
        each of its `labels`, else ``name_0`` to ``name_{k-1}``, row-major for more dimensions.

        Args:
            names: of the columns, by output, e.g. ``{"probabilities": ["Adelie", "Chinstrap", "Gentoo"]}``.

        Raises:
            ValueError: outputs have no rows or different numbers of rows, or the number of names is not that of the columns.

        Example::

            print(client.infer("penguins", frame).to_frame()["label"].value_counts())
        """
        with needed("to_frame()", "pandas"):
            from splitserve.client.frames import to_frame

        return to_frame(self._table(names), self._index)

    def to_polars(self, names: Names = None) -> Any:
        """The outputs as a polars DataFrame; columns and errors as `to_frame`.

        Example::

            client.infer("penguins", polars_frame).to_polars().filter(pl.col("label") == "Gentoo")
        """
        with needed("to_polars()", "polars"):
            import polars

        return polars.DataFrame({name: _plain(values) for name, values in self._table(names).items()})

    def to_arrow(self, names: Names = None) -> Any:
        """The outputs as a pyarrow Table; columns and errors as `to_frame`.

        Example::

            pyarrow.parquet.write_table(client.infer("penguins", table).to_arrow(), "answers.parquet")
        """
        with needed("to_arrow()", "pyarrow"):
            import pyarrow

        return pyarrow.table({name: _plain(values) for name, values in self._table(names).items()})

    def to_records(self, names: Names = None) -> list[dict[str, Any]]:
        """One dict for each row, of types that JSON has: columns and errors as `to_frame`.

        NaN and infinities, which JSON does not have, are None; bytes that are no text are base64.

        Example::

            json.dumps(client.infer("penguins", frame).to_records())
        """
        columns = {name: _json_values(values) for name, values in self._table(names).items()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _table(self, names: Names) -> dict[str, Array]:
        """The columns of a table by name."""
        labelled = {output: [f"{output}_{label}" for label in labels] for output, labels in self.labels.items()}
        chosen = {**labelled, **(names or {})}
        if unknown := chosen.keys() - self.keys():
            raise ValueError(f"names: expected some of the outputs {list(self)}, got {sorted(unknown)}")
        columns: dict[str, Array] = {}
        for output, array in self.items():
            columns |= _columns(output, array, chosen.get(output))
        if len({len(values) for values in columns.values()}) > 1:
            raise ValueError(f"the outputs have different numbers of rows: {[len(array) for array in self.values()]}")
        return columns


def _rebuilt(outputs: dict[str, Array], model: str, version: str, index: Any, labels: dict[str, list[str]], id: str) -> Answer:
    return Answer(outputs, model=model, version=version, index=index, labels=labels, id=id)


def _columns(output: str, array: Array, names: Sequence[str] | None) -> dict[str, Array]:
    if array.ndim == 0:
        raise ValueError(f'output "{output}" is a scalar and has no rows')
    values = as_text(array) if array.dtype.kind == "O" else array
    if array.ndim == 1 or array.shape[1:] == (1,):
        names = names or (output,)
    n_columns = math.prod(array.shape[1:])
    names = names or [f"{output}_{position}" for position in range(n_columns)]
    if len(names) != n_columns:
        raise ValueError(f'output "{output}": expected {n_columns} names, got {len(names)}')
    table = values.reshape(len(array), n_columns)
    return {name: table[:, position] for position, name in enumerate(names)}


def _plain(values: Array) -> Any:
    return values.tolist() if values.dtype.kind == "O" else np.ascontiguousarray(values)


def _json_values(values: Array) -> list[Any]:
    if values.dtype.kind == "f":
        return [value if math.isfinite(value) else None for value in values.astype(np.float64).tolist()]
    if values.dtype.kind == "O":
        return [_json_text(value) for value in values.tolist()]
    plain: list[Any] = values.tolist()
    return plain


def _json_text(value: Any) -> Any:
    if not isinstance(value, bytes):
        return value
    from base64 import b64encode

    return b64encode(value).decode()


def as_text(array: Array) -> Array:
    """An array of ``str``, if every element is UTF-8; else as it is."""
    try:
        elements = [element.decode() if isinstance(element, bytes) else element for element in array.ravel().tolist()]
    except UnicodeDecodeError:
        return array
    return objects(elements, array.shape)


def outputs_of(response: InferResponse, text: Text = str) -> dict[str, Array]:
    """The arrays of a response.

    Args:
        response: of a server.
        text: what BYTES become: ``str`` where all elements of an output are UTF-8, as those that were published as text are.

    Raises:
        PairMismatch: a tensor's bytes are not what its datatype and shape say.
    """
    try:
        return {tensor.name: _writable(to_array(tensor), text) for tensor in response.outputs}
    except InvalidInput as error:  # not the caller's fault
        raise PairMismatch(f"malformed response: {error.message}", model=response.model, pair=response.version) from error


def _writable(array: Array, text: Text) -> Array:
    if array.dtype.kind == "O":
        return as_text(array) if text is str else array
    return array if array.flags.writeable else array.copy()
