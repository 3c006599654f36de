"""Signatures: names, datatypes and shapes of a bundle's inputs and outputs.

Checks requests and responses against a signature, and the two halves of a pair against each other; predicts the size of outputs.
Knows tensors as bytes, no numerics.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from splitserve.errors import InvalidInput, PairMismatch, SplitserveError
from splitserve.tensors import DATATYPES, Tensor, holds_elements, validate

Dimension = int | str
"""A fixed size, or the name of a variable one, e.g. ``"batch"``. In a signature equal names are equal sizes; -1 is any size."""

BATCH = "batch"
"""The name of the leading dimension: independent rows."""


class TensorSpec(msgspec.Struct, frozen=True):
    """One input or output of a signature. All inputs are required."""

    name: str
    datatype: str
    shape: tuple[Dimension, ...]

    @property
    def wire_shape(self) -> tuple[int, ...]:
        """The shape as the protocol writes it: -1 for a variable size."""
        return tuple(size if isinstance(size, int) else -1 for size in self.shape)

    @property
    def is_column(self) -> bool:
        """Whether it has one value per row: declared as (batch, 1), accepted as (batch,) too."""
        return len(self.shape) == 2 and self.shape[1] == 1 and not isinstance(self.shape[0], int)

    def __str__(self) -> str:
        return f"{self.datatype} {list(self.shape)}"


_WIDER: dict[str, tuple[str, ...]] = {
    "FP64": ("FP32", "FP16", "BF16", "INT64", "INT32", "INT16", "INT8", "UINT64", "UINT32", "UINT16", "UINT8"),
    "FP32": ("FP16", "BF16", "INT16", "INT8", "UINT16", "UINT8"),
    "FP16": ("INT8", "UINT8"),
    "INT64": ("INT32", "INT16", "INT8", "UINT32", "UINT16", "UINT8"),
    "INT32": ("INT16", "INT8", "UINT16", "UINT8"),
    "INT16": ("INT8", "UINT8"),
    "UINT64": ("UINT32", "UINT16", "UINT8"),
    "UINT32": ("UINT16", "UINT8"),
    "UINT16": ("UINT8",),
}
"""Datatypes that a preprocessor accepts in place of the declared one: those that numpy casts to it under the rule "safe"."""

_ROUNDED = {("INT64", "FP64"), ("UINT64", "FP64")}
"""Those that numpy calls safe although large values are rounded: each value is checked."""


def accepts(declared: str, sent: str) -> bool:
    """Whether a tensor of datatype ``sent`` is accepted where ``declared`` is expected: it is equal, or can be widened."""
    return declared == sent or sent in _WIDER.get(declared, ())


def check_inputs(specs: Sequence[TensorSpec], inputs: Iterable[Tensor], *, widen: bool) -> None:
    """Check a request's tensors, including their bytes, against a signature's inputs.

    Args:
        specs: the inputs of the signature.
        inputs: the tensors of the request, in any order.
        widen: accept datatypes that can be widened to the declared one, and (batch,) where (batch, 1) is declared.

    Raises:
        InvalidInput: names the input, what was expected and what was sent.
    """
    by_name = {spec.name: spec for spec in specs}
    seen: dict[str, Tensor] = {}
    for tensor in inputs:
        if tensor.name in seen:
            raise InvalidInput(f'input "{tensor.name[:64]}" is given twice')
        spec = by_name.get(tensor.name)
        if spec is None:
            raise InvalidInput(f'unknown input "{tensor.name[:64]}", expected {_names(by_name)}')
        _check_input(spec, tensor, widen)
        seen[tensor.name] = tensor
    if missing := by_name.keys() - seen.keys():
        raise InvalidInput(f"missing input {_names(name for name in by_name if name in missing)}")
    _check_batch([seen[spec.name] for spec in specs if spec.shape and not isinstance(spec.shape[0], int)])


class InputCheck:
    """`check_inputs` for one signature, with a fast path for tensors that are obviously valid.

    Args:
        specs: the inputs of the signature.
        widen: as for `check_inputs`.
        with_contents: check the elements of BYTES tensors too; not needed where they are decoded afterwards.
    """

    def __init__(self, specs: Sequence[TensorSpec], *, widen: bool, with_contents: bool = True) -> None:
        self._specs = specs
        self._widen = widen
        self._with_contents = with_contents
        self._row_forms = [self._row_form(spec) for spec in specs]

    def __call__(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The tensors in the signature's order.

        Raises:
            InvalidInput: as `check_inputs`.
        """
        if len(inputs) != len(self._row_forms) or not inputs or not inputs[0].shape:
            return self.fully(inputs)
        n_rows = inputs[0].shape[0]
        for (name, inner, row_sizes), tensor in zip(self._row_forms, inputs):  # noqa: B905, strict=True costs as much as the rest
            shape = tensor.shape
            if tensor.name != name or not shape or shape[0] != n_rows or shape[1:] != inner:
                return self.fully(inputs)
            row_size = row_sizes.get(tensor.datatype)
            if row_size is None:
                return self.fully(inputs)
            if row_size < 0:
                if not holds_elements(tensor.raw, -row_size * n_rows):
                    return self.fully(inputs)
            elif row_size and len(tensor.raw) != n_rows * row_size:
                return self.fully(inputs)
        return inputs if n_rows > 0 else self.fully(inputs)

    def fully(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The same without the fast path, including the elements of BYTES tensors."""
        check_inputs(self._specs, inputs, widen=self._widen)
        by_name = {tensor.name: tensor for tensor in inputs}
        return [by_name[spec.name] for spec in self._specs]

    def _row_form(self, spec: TensorSpec) -> tuple[str, tuple[Dimension, ...], dict[str, int]]:
        """Name, shape of a row, and the bytes of a row by accepted datatype; {}: no fast path.

        For BYTES it is the number of elements, negated; 0: they are not checked.
        """
        inner = spec.shape[1:]
        sizes = [size for size in inner if isinstance(size, int) and size > 0]
        if not spec.shape or isinstance(spec.shape[0], int) or len(sizes) != len(inner) or spec.datatype == "BOOL":
            return spec.name, inner, {}
        if spec.datatype == "BYTES":
            return spec.name, inner, {"BYTES": -math.prod(sizes) if self._with_contents else 0}
        taken = [spec.datatype, *(_WIDER.get(spec.datatype, ()) if self._widen else ())]
        taken = [name for name in taken if (name, spec.datatype) not in _ROUNDED]
        return spec.name, inner, {name: DATATYPES[name].itemsize * math.prod(sizes) for name in taken if name in DATATYPES}


def _check_input(spec: TensorSpec, tensor: Tensor, widen: bool) -> None:
    if not (accepts(spec.datatype, tensor.datatype) if widen else spec.datatype == tensor.datatype):
        raise InvalidInput(f'input "{spec.name}": expected datatype {spec.datatype}, got {tensor.datatype[:32]}')
    if not (_shape_fits(spec.shape, tensor.shape) or (widen and spec.is_column and len(tensor.shape) == 1)):
        raise InvalidInput(f'input "{spec.name}": expected shape {list(spec.wire_shape)}, got {list(tensor.shape)[:16]}')
    validate(f'input "{spec.name}"', tensor)
    if (tensor.datatype, spec.datatype) in _ROUNDED:
        _check_exact(spec, tensor)


def _check_exact(spec: TensorSpec, tensor: Tensor) -> None:
    values = memoryview(tensor.raw).cast("q" if tensor.datatype == "INT64" else "Q")
    if not values or (min(values) >= -(2**53) and max(values) <= 2**53):
        return
    for index, value in enumerate(values):
        if int(float(value)) != value:
            what = f'input "{spec.name}": element {index}'
            raise InvalidInput(f"{what}: expected an integer that {spec.datatype} holds exactly, got {value}")


def _shape_fits(expected: Sequence[Dimension], shape: Sequence[int]) -> bool:
    return len(expected) == len(shape) and all(
        size >= 0 and (isinstance(want, str) or want in (-1, size)) for want, size in zip(expected, shape, strict=True)
    )


def _check_batch(tensors: Sequence[Tensor]) -> None:
    """Raises:
    InvalidInput: inputs with a variable leading dimension have different numbers of rows.
    """
    for tensor in tensors[1:]:
        if tensor.shape[0] != tensors[0].shape[0]:
            raise InvalidInput(
                f'input "{tensor.name}" has {tensor.shape[0]} rows, but input "{tensors[0].name}" has {tensors[0].shape[0]}'
            )


def _names(names: Iterable[str]) -> str:
    shown = [f'"{name}"' for name in names]
    return ", ".join(shown[:20]) + (f" and {len(shown) - 20} more" if len(shown) > 20 else "")


def bound_sizes(specs: Sequence[TensorSpec], tensors: Iterable[Tensor]) -> dict[str, int]:
    """The sizes that tensors give to the variable dimensions of their specs, by name.

    Args:
        specs: of a signature's inputs.
        tensors: valid for them, in any order.
    """
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    return {
        name: size
        for spec in specs
        for name, size in zip(spec.shape, shapes.get(spec.name, ()))  # noqa: B905 - (batch,) stands for (batch, 1)
        if isinstance(name, str)
    }


def empty(spec: TensorSpec, sizes: Mapping[str, int] | None = None) -> Tensor:
    """A tensor of shape (0, ...): no rows.

    Args:
        spec: with a variable leading dimension.
        sizes: of the other variable dimensions, by name; 0 where it is not known.
    """
    sizes = sizes or {}
    inner = (size if isinstance(size, int) else sizes.get(size, 0) for size in spec.shape[1:])
    return Tensor(spec.name, spec.datatype, (0, *(max(size, 0) for size in inner)), b"")


class OutputBytes:
    """How many bytes a signature's outputs have, known from the inputs before anything is computed.

    A lower bound: sizes that only the computation knows count as 0, an element of BYTES as the four bytes of its length.

    Args:
        inputs: of the signature.
        outputs: of the same.
    """

    def __init__(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        self._inputs = inputs
        self._outputs = outputs
        has_fixed_rows = all(
            spec.shape and spec.shape[0] == BATCH and all(isinstance(size, int) for size in spec.shape[1:]) for spec in outputs
        )
        self._row_bytes = sum(_least_bytes(spec, {BATCH: 1}) for spec in outputs) if has_fixed_rows else None

    def at_least(self, n_rows: int, tensors: Sequence[Tensor] = (), names: Sequence[str] = ()) -> int:
        """Bytes of the outputs together.

        Args:
            n_rows: of the inputs.
            tensors: valid inputs in any order, for the sizes of their other dimensions; without them those count as 0.
            names: of the outputs that are computed; all by default.
        """
        if self._row_bytes is not None and not names:
            return n_rows * self._row_bytes
        sizes = bound_sizes(self._inputs, tensors) | {BATCH: n_rows}
        return sum(_least_bytes(spec, sizes) for spec in self._outputs if not names or spec.name in names)


def _least_bytes(spec: TensorSpec, sizes: Mapping[str, int]) -> int:
    shape = [size if isinstance(size, int) else sizes.get(size, 0) for size in spec.shape]
    return math.prod(max(size, 0) for size in shape) * (DATATYPES[spec.datatype].itemsize or 4)


def is_row_wise(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> bool:
    """Whether every tensor of a signature has a variable leading dimension: rows, which can be merged and split."""
    return all(spec.shape and not isinstance(spec.shape[0], int) for spec in (*inputs, *outputs))


def choose_outputs(specs: Sequence[TensorSpec], requested: Sequence[str]) -> list[str]:
    """Names of the outputs to answer with, in the order requested; all if none is requested.

    Raises:
        InvalidInput: one is not an output, or is requested twice.
    """
    names = [spec.name for spec in specs]
    for index, name in enumerate(requested):
        if name not in names:
            raise InvalidInput(f'unknown output "{name[:64]}", expected one of {_names(names)}')
        if name in requested[:index]:
            raise InvalidInput(f'output "{name}" is requested twice')
    return list(requested) or names


def fits(outputs: Sequence[TensorSpec], inputs: Sequence[TensorSpec]) -> list[str]:
    """Why one stage's outputs cannot be the next stage's inputs; empty if they can.

    The order of tensors does not matter. A variable size fits only where the predictor's is variable too; where the predictor has
    one name in several places, the preprocessor must produce one size in all of them.

    Args:
        outputs: of the preprocessor.
        inputs: of the predictor.
    """
    produced = {spec.name: spec for spec in outputs}
    expected = {spec.name: spec for spec in inputs}
    differences = [
        f'"{name}" is an input of the predictor but no output of the preprocessor' for name in expected if name not in produced
    ]
    differences += [
        f'"{name}" is an output of the preprocessor but no input of the predictor' for name in produced if name not in expected
    ]
    for name, spec in expected.items():
        if name in produced:
            differences += _differences(produced[name], spec)
    return differences or _unequal_sizes(produced, inputs)


def _differences(produced: TensorSpec, expected: TensorSpec) -> list[str]:
    if produced.datatype != expected.datatype:
        return [f'"{produced.name}": expected datatype {expected.datatype}, the preprocessor produces {produced.datatype}']
    if len(produced.shape) != len(expected.shape):
        return [f'"{produced.name}": expected shape {list(expected.shape)}, the preprocessor produces {list(produced.shape)}']
    return [
        f'"{produced.name}": expected {want} in dimension {axis}, the preprocessor produces {have}'
        for axis, (have, want) in enumerate(zip(produced.shape, expected.shape, strict=True))
        if isinstance(want, int) and want != -1 and have != want
    ]


def _unequal_sizes(produced: Mapping[str, TensorSpec], inputs: Sequence[TensorSpec]) -> list[str]:
    """Where the predictor expects equal sizes that the preprocessor may produce unequal."""
    first: dict[str, Dimension] = {}
    return [
        f'"{spec.name}": expected "{want}" ({first[want]} elsewhere) in dimension {axis}, the preprocessor produces {have}'
        for spec in inputs
        for axis, (have, want) in enumerate(zip(produced[spec.name].shape, spec.shape, strict=True))
        if isinstance(want, str) and first.setdefault(want, have) != have
    ]


def check_outputs(specs: Sequence[TensorSpec], outputs: Sequence[Tensor], n_rows: int) -> None:
    """Check a stage's response against its signature.

    Args:
        specs: the outputs of the signature.
        outputs: of the response, in any order.
        n_rows: rows that were sent.

    Raises:
        PairMismatch: a tensor is missing, or has another datatype, shape, number of rows or bytes.
    """
    by_name = {tensor.name: tensor for tensor in outputs}
    for spec in specs:
        tensor = by_name.get(spec.name)
        if tensor is None:
            raise PairMismatch(f'output "{spec.name}" is missing')
        expected = tuple(n_rows if size == BATCH else size for size in spec.shape)
        if tensor.datatype != spec.datatype or not _shape_fits(expected, tensor.shape):
            raise PairMismatch(
                f'output "{spec.name}": expected {spec.datatype} {list(expected)}, got {tensor.datatype} {list(tensor.shape)}'
            )
        try:
            validate(f'output "{spec.name}"', tensor)
        except SplitserveError as error:  # not the caller's fault
            raise PairMismatch(error.message) from None
