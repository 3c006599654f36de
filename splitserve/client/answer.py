"""The result of `Client.infer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from splitserve.arrays import Array, to_array
from splitserve.errors import InvalidInput, PairMismatch
from splitserve.oip.messages import InferResponse


class Answer(dict[str, Array]):
    """Arrays (n_rows, ...) by output name; BYTES as objects of type ``bytes``.

    ``model`` and ``version`` are those that answered; with splitserve the version is a pair, ``"K.M"``.
    """

    def __init__(
        self,
        outputs: Mapping[str, Array],
        *,
        model: str,
        version: str,
        index: Any = None,
        labels: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        super().__init__(outputs)
        self.model = model
        self.version = version
        self.labels: dict[str, list[str]] = {output: list(names) for output, names in (labels or {}).items()}
        """By output, what its columns are: the classes of probabilities, in their order; empty if the server does not say."""
        self._index = index

    def to_frame(self, names: Mapping[str, Sequence[str]] | None = None) -> Any:
        """The outputs as a pandas DataFrame, with the index of the DataFrame that was sent, if any.

        An output with one value per row becomes a column of its name, one with k values per row k columns: ``name_LABEL`` for
        each of its `labels`, else ``name_0`` to ``name_{k-1}``, row-major for more dimensions. BYTES become text
        if they are UTF-8.

        Args:
            names: of the columns, by output, e.g. ``{"probabilities": ["Adelie", "Chinstrap", "Gentoo"]}``.

        Raises:
            ValueError: outputs have no rows or different numbers of rows, or the number of names is not that of the columns.
        """
        from splitserve.client.frames import to_frame

        labelled = {output: [f"{output}_{label}" for label in labels] for output, labels in self.labels.items()}
        return to_frame(self, {**labelled, **(names or {})}, self._index)


def outputs_of(response: InferResponse) -> dict[str, Array]:
    """The arrays of a response.

    Raises:
        PairMismatch: a tensor's bytes are not what its datatype and shape say.
    """
    try:
        return {tensor.name: to_array(tensor) for tensor in response.outputs}
    except InvalidInput as error:  # not the caller's fault
        raise PairMismatch(f"malformed response: {error.message}", model=response.model, pair=response.version) from error
