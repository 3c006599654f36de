"""What the values of a plan are: known before any row is computed, so that a broken plan is refused when it is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NoReturn

import msgspec
import numpy as np

from splitserve.arrays import Array
from splitserve.repository.manifest import Column

MAX_WIDTH = 2**24
"""Most elements of a value's row. A short plan can ask for a very wide one, e.g. of polynomials."""

Kind = Literal["request", "numbers", "text", "documents", "files", "pictures"]

DTYPES = {name: np.dtype(name) for name in ("bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))}
DTYPES |= {"float32": np.dtype("float32"), "float64": np.dtype("float64")}


class PlanError(Exception):
    """A plan is broken; the message says where, without the name of the file."""


class RefusedValue(Exception):
    """The transforms refuse a value of the request; the message is that of scikit-learn."""


class Layout(msgspec.Struct, frozen=True):
    """A value: "request" is the columns of a request, "numbers" an array (n_rows, *inner) of a dtype, "text" a list of values for
    each of ``inner[0]`` columns, "documents" a list of text, "files" a list of bytes, "pictures" a list of arrays.
    """

    kind: Kind
    dtype: Any = None
    inner: tuple[int, ...] = ()
    columns: tuple[Column, ...] = ()

    @property
    def width(self) -> int:
        return self.inner[0] if self.inner else 1

    def __str__(self) -> str:
        return f"{self.kind} {self.dtype} {list(self.inner)}" if self.kind == "numbers" else f"{self.kind} {list(self.inner)}"


Run = Callable[..., Any]
"""The values that an operation is of -> its own. Pure, so safe to call from several threads."""


def numbers(dtype: Any, *inner: int) -> Layout:
    """Raises:
    PlanError: wider than `MAX_WIDTH`.
    """
    if any(size < 1 for size in inner) or math.prod(inner) > MAX_WIDTH:
        raise PlanError(f"expected 1 to {MAX_WIDTH} numbers a row, got {math.prod(inner)}")
    return Layout("numbers", np.dtype(dtype), inner)


class StepArrays:
    """The arrays of one step, each taken once and checked.

    Args:
        arrays: by name.
    """

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self._arrays = dict(arrays)

    def take(self, name: str, kinds: str, *shape: int | None) -> Array:
        """Args:
            name: of the array.
            kinds: of the dtype: "f" floats, "i" int64, "b" bool.
            shape: expected; None accepts any size.

        Raises:
            PlanError: it is missing, or has another dtype or shape.
        """
        array = self._arrays.pop(name, None)
        if array is None:
            raise PlanError(f'its array "{name}" is missing')
        allowed = {
            "f": ("f4", "f8"),
            "i": ("i8",),
            "b": ("?",),
            "n": ("f4", "f8", "?", *(f"{s}{n}" for s in "iu" for n in (1, 2, 4, 8))),
        }
        if array.dtype not in [np.dtype(each) for kind in kinds for each in allowed[kind]]:
            raise PlanError(f'array "{name}": dtype {array.dtype} is not allowed')
        fits = len(array.shape) == len(shape) and all(want in (None, have) for want, have in zip(shape, array.shape, strict=True))
        if not fits:
            raise PlanError(f'array "{name}": expected shape {list(shape)}, got {list(array.shape)}')
        return array

    def finite(self, name: str, kinds: str, *shape: int | None) -> Array:
        """As `take`, of numbers that are finite."""
        array = self.take(name, kinds, *shape)
        if not np.isfinite(array).all():
            raise PlanError(f'array "{name}": expected finite numbers')
        return array

    def places(self, name: str, limit: int, *shape: int | None, least: int = 0) -> Array:
        """As `take`, of whole numbers from ``least`` to below ``limit``."""
        array = self.take(name, "i", *shape)
        if array.size and not (int(array.min()) >= least and int(array.max()) < limit):
            raise PlanError(f'array "{name}": expected numbers from {least} to {limit - 1}')
        return array

    def end(self) -> None:
        """Raises:
        PlanError: an array was not taken.
        """
        if self._arrays:
            raise PlanError(f'it has no array "{next(iter(self._arrays))[:64]}"')


class Operation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="operation"):
    """A step of a plan: what to do with the values numbered ``of``; 0 is the request, and step n makes the value n, from 1.

    Subclasses are the closed list of operations; their fields are the step's in ``plan.json``.
    """

    VERSION: ClassVar[int] = 1
    IS_EXACT: ClassVar[bool] = True
    """Whether the bits are those of scikit-learn on every machine; else numbers may differ in the last places."""

    version: int = 1
    of: tuple[int, ...]

    def bind(self, given: list[Layout], arrays: StepArrays) -> tuple[Run, Layout]:
        """What computes the step, and the layout of its value.

        Args:
            given: layouts of the values that it is of.
            arrays: of the step.

        Raises:
            PlanError: the parameters, the arrays and the layouts do not fit each other.
        """
        raise NotImplementedError


def one(given: list[Layout], *kinds: Kind) -> Layout:
    """The only layout, of one of these kinds.

    Raises:
        PlanError: there are several, or it is of another kind.
    """
    if len(given) != 1 or given[0].kind not in kinds:
        raise PlanError(f"expected one value of {' or '.join(kinds)}, got {', '.join(map(str, given)) or 'none'}")
    return given[0]


def block(given: list[Layout], kinds: str = "fiub") -> Layout:
    """The only layout, of numbers in columns.

    Args:
        given: layouts.
        kinds: allowed kinds of dtypes.

    Raises:
        PlanError: it is not.
    """
    layout = one(given, "numbers")
    if len(layout.inner) != 1 or layout.dtype.kind not in kinds:
        raise PlanError(f"expected columns of numbers, got {layout}")
    return layout


def refuse(message: str) -> NoReturn:
    """Raises:
    RefusedValue: always.
    """
    raise RefusedValue(message)


def dtype_of(name: str) -> np.dtype[Any]:
    """Raises:
    PlanError: not a dtype of plans.
    """
    if name not in DTYPES:
        raise PlanError(f'unknown dtype "{name[:32]}"')
    return DTYPES[name]
