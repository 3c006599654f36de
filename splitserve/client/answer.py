"""What `Client.infer` gives back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from splitserve.arrays import Array, to_array
from splitserve.errors import InvalidInput, PairMismatch
from splitserve.oip.messages import InferResponse


class Answer(dict[str, Array]):
    """Arrays by output name; BYTES as objects of type ``bytes``.

    ``model`` and ``version`` say what gave it: the version is a pair, ``"K.M"``, where the server is splitserve.
    """

    def __init__(self, outputs: Mapping[str, Array], *, model: str, version: str, index: Any = None) -> None:
        super().__init__(outputs)
        self.model = model
        self.version = version
        self._index = index

    def to_frame(self, names: Mapping[str, Sequence[str]] | None = None) -> Any:
        """The outputs as a pandas DataFrame, with the index of the DataFrame that was sent, if one was.

        An output of one value a row is the column of its name; BYTES become text where they are UTF-8. One of k values a row
        becomes k columns, ``name_0`` to ``name_{k-1}``, row-major for more dimensions.

        Args:
            names: by output, other names for its columns, e.g. ``{"probabilities": ["Adelie", "Chinstrap", "Gentoo"]}``.

        Raises:
            ValueError: outputs have no rows or different numbers of them, or the names are not as many as the columns.
        """
        from splitserve.client.frames import to_frame

        return to_frame(self, names or {}, self._index)


def outputs_of(response: InferResponse) -> dict[str, Array]:
    """The arrays of an answer.

    Raises:
        PairMismatch: a tensor's bytes are not what its datatype and shape say.
    """
    try:
        return {tensor.name: to_array(tensor) for tensor in response.outputs}
    except InvalidInput as error:  # the caller did not make these bytes
        raise PairMismatch(f"the answer is broken: {error.message}", model=response.model, pair=response.version) from error
