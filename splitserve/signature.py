"""Signatures: what a version takes and gives. Checks a request against one, and two halves of a pair against each other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from splitserve.errors import InvalidInput, PairMismatch, SplitserveError
from splitserve.tensors import DATATYPES, Tensor, validate

Dimension = int | str
"""A fixed size, or the name of one that varies, e.g. ``"batch"``."""

BATCH = "batch"
"""The name of the leading dimension: rows, which are independent of each other."""


class TensorSpec(msgspec.Struct, frozen=True):
    """Name, datatype and shape of one tensor of a signature. ``optional`` inputs may be left out of a request."""

    name: str
    datatype: str
    shape: tuple[Dimension, ...]

    @property
    def wire_shape(self) -> tuple[int, ...]:
        """The shape as the protocol writes it: -1 where the size varies."""
        return tuple(size if isinstance(size, int) else -1 for size in self.shape)

    @property
    def is_column(self) -> bool:
        """One value a row: declared (batch, 1), and accepted as (batch,) too."""
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
"""Datatypes that a preprocessor takes in place of the declared one: those that numpy casts to it under the rule "safe"."""


def accepts(declared: str, sent: str) -> bool:
    """Whether a tensor of datatype ``sent`` may stand where ``declared`` is expected, to be widened without loss."""
    return declared == sent or sent in _WIDER.get(declared, ())


def check_inputs(specs: Sequence[TensorSpec], inputs: Iterable[Tensor], *, widen: bool) -> None:
    """Check a request's tensors, their bytes included, against a signature's inputs.

    Args:
        specs: the inputs of the signature.
        inputs: the tensors of the request, in any order.
        widen: take narrower numbers where they convert without loss, and (batch,) where (batch, 1) is declared.

    Raises:
        InvalidInput: names the input, what was expected and what came.
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
    """`check_inputs` for one signature, prepared: what is plainly right passes at once, all else is left to it.

    Args:
        specs: the inputs of the signature.
        widen: as for `check_inputs`.
        with_contents: look into BYTES tensors too; whoever decodes them anyway finds what is wrong with them.
    """

    def __init__(self, specs: Sequence[TensorSpec], *, widen: bool, with_contents: bool = True) -> None:
        self._specs = specs
        self._widen = widen
        self._with_contents = with_contents
        self._plain = [self._plain_form(spec) for spec in specs]

    def __call__(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The tensors in the signature's order.

        Raises:
            InvalidInput: as `check_inputs`.
        """
        return inputs if self._is_plain(inputs) else self.fully(inputs)

    def fully(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The same by `check_inputs`, contents included."""
        check_inputs(self._specs, inputs, widen=self._widen)
        by_name = {tensor.name: tensor for tensor in inputs}
        return [by_name[spec.name] for spec in self._specs]

    def _is_plain(self, inputs: Sequence[Tensor]) -> bool:
        if len(inputs) != len(self._plain) or not inputs or not inputs[0].shape:
            return False
        n_rows = inputs[0].shape[0]
        for (name, inner, row_sizes), tensor in zip(self._plain, inputs):  # noqa: B905, strict=True costs as much as the rest
            shape = tensor.shape
            if tensor.name != name or not shape or shape[0] != n_rows or shape[1:] != inner:
                return False
            row_size = row_sizes.get(tensor.datatype)
            if row_size is None or (row_size and len(tensor.raw) != n_rows * row_size):
                return False
        return n_rows > 0

    def _plain_form(self, spec: TensorSpec) -> tuple[str, tuple[Dimension, ...], dict[str, int]]:
        """Name, shape of a row, and the bytes of a row by the datatypes in which it is plainly right; 0: any number of bytes."""
        inner = spec.shape[1:]
        sizes = [size for size in inner if isinstance(size, int) and size > 0]
        if not spec.shape or isinstance(spec.shape[0], int) or len(sizes) != len(inner) or spec.datatype == "BOOL":
            return spec.name, inner, {}
        if spec.datatype == "BYTES":
            return spec.name, inner, {} if self._with_contents else {"BYTES": 0}
        taken = [spec.datatype, *(_WIDER.get(spec.datatype, ()) if self._widen else ())]
        return spec.name, inner, {name: DATATYPES[name].itemsize * math.prod(sizes) for name in taken if name in DATATYPES}


def _check_input(spec: TensorSpec, tensor: Tensor, widen: bool) -> None:
    if not (accepts(spec.datatype, tensor.datatype) if widen else spec.datatype == tensor.datatype):
        raise InvalidInput(f'input "{spec.name}": expected datatype {spec.datatype}, got {tensor.datatype[:32]}')
    if not (_shape_fits(spec.shape, tensor.shape) or (widen and spec.is_column and len(tensor.shape) == 1)):
        raise InvalidInput(f'input "{spec.name}": expected shape {list(spec.wire_shape)}, got {list(tensor.shape)[:16]}')
    validate(f'input "{spec.name}"', tensor)


def _shape_fits(expected: Sequence[Dimension], shape: Sequence[int]) -> bool:
    return len(expected) == len(shape) and all(
        size >= 0 and (isinstance(want, str) or want in (-1, size)) for want, size in zip(expected, shape, strict=True)
    )


def _check_batch(tensors: Sequence[Tensor]) -> None:
    """All inputs with a free leading dimension have the same number of rows."""
    for tensor in tensors[1:]:
        if tensor.shape[0] != tensors[0].shape[0]:
            raise InvalidInput(
                f'input "{tensor.name}" has {tensor.shape[0]} rows, but input "{tensors[0].name}" has {tensors[0].shape[0]}'
            )


def _names(names: Iterable[str]) -> str:
    shown = [f'"{name}"' for name in names]
    return ", ".join(shown[:20]) + (f" and {len(shown) - 20} more" if len(shown) > 20 else "")


def empty(spec: TensorSpec) -> Tensor:
    """A tensor of no rows."""
    return Tensor(spec.name, spec.datatype, tuple(max(size, 0) for size in spec.wire_shape), b"")


def is_row_wise(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> bool:
    """Whether every tensor of a signature has a leading dimension that varies: rows, which can be merged and cut apart."""
    return all(spec.shape and not isinstance(spec.shape[0], int) for spec in (*inputs, *outputs))


def choose_outputs(specs: Sequence[TensorSpec], wanted: Sequence[str]) -> list[str]:
    """Names of the outputs to answer with, in the order asked for; all when none is asked for.

    Raises:
        InvalidInput: one is not an output, or is asked for twice.
    """
    names = [spec.name for spec in specs]
    for index, name in enumerate(wanted):
        if name not in names:
            raise InvalidInput(f'unknown output "{name[:64]}", expected one of {_names(names)}')
        if name in wanted[:index]:
            raise InvalidInput(f'output "{name}" is asked for twice')
    return list(wanted) or names


def fits(outputs: Sequence[TensorSpec], inputs: Sequence[TensorSpec]) -> list[str]:
    """What keeps one stage's outputs from being the next stage's inputs; empty when they fit.

    Order never matters. A varying size fits only where the taker's may vary too, and where the taker has one name in several
    places, what is given there must be of one size.

    Args:
        outputs: of the preprocessor.
        inputs: of the predictor.
    """
    given = {spec.name: spec for spec in outputs}
    wanted = {spec.name: spec for spec in inputs}
    differences = [f'"{name}" is wanted but not given' for name in wanted if name not in given]
    differences += [f'"{name}" is given but not wanted' for name in given if name not in wanted]
    for name, want in wanted.items():
        if name in given:
            differences += _differences(given[name], want)
    return differences or _unequal_sizes(given, inputs)


def _differences(give: TensorSpec, want: TensorSpec) -> list[str]:
    if give.datatype != want.datatype:
        return [f'"{give.name}": datatype {give.datatype} is given, {want.datatype} is wanted']
    if len(give.shape) != len(want.shape):
        return [f'"{give.name}": shape {list(give.shape)} is given, {list(want.shape)} is wanted']
    return [
        f'"{give.name}": dimension {axis} is {have} where {need} is wanted'
        for axis, (have, need) in enumerate(zip(give.shape, want.shape, strict=True))
        if isinstance(need, int) and need != -1 and have != need
    ]


def _unequal_sizes(given: Mapping[str, TensorSpec], inputs: Sequence[TensorSpec]) -> list[str]:
    """Where the taker's dimensions of one name are given what need not be equal."""
    first: dict[str, Dimension] = {}
    return [
        f'"{want.name}": dimension {axis} is {have} where "{need}" is wanted, which is {first[need]} elsewhere'
        for want in inputs
        for axis, (have, need) in enumerate(zip(given[want.name].shape, want.shape, strict=True))
        if isinstance(need, str) and first.setdefault(need, have) != have
    ]


def check_outputs(specs: Sequence[TensorSpec], outputs: Sequence[Tensor], n_rows: int) -> None:
    """Check what a stage answered against its signature.

    Raises:
        PairMismatch: a tensor is missing, or its datatype, shape, number of rows or bytes are not the promised ones.
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
        except SplitserveError as error:  # the caller did not make these bytes
            raise PairMismatch(error.message) from None
