"""Golden samples: inputs that a bundle was run on when it was published, with the outputs that it gave."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import IO

import msgspec
import numpy as np

from splitserve.arrays import Array, from_array, to_array
from splitserve.errors import SplitserveError
from splitserve.repository.archives import check_npz, check_unpacked
from splitserve.repository.manifest import BOUNDS, GOLDEN_FILE, QUANTISED_BOUND, BundleError, Manifest, Tolerance
from splitserve.signature import TensorSpec
from splitserve.tensors import Tensor

_RAW_DATATYPES = ("BYTES", "BF16")
"""Datatypes without a numpy dtype: stored as wire bytes, with the shape in an array of its own."""


MAX_ROWS = 10_000
"""Most golden samples that are read. A file of 350 kB can hold six million equal rows, each of which would be transformed."""

_ROUNDING = 1 + 1e-6
"""The scale is computed again where a bundle is loaded, from numbers that were written as they are."""


class Golden(msgspec.Struct, frozen=True):
    """The tensors of all samples, one sample a row. ``rows``: the raw rows that a predictor's inputs were made from, if known."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    rows: tuple[Tensor, ...] = ()


class Difference(msgspec.Struct, frozen=True):
    """The element of an output that differs most from the golden one."""

    tensor: str
    sample: int
    index: tuple[int, ...]
    expected: str
    got: str

    def __str__(self) -> str:
        return (
            f'output "{self.tensor}" of golden sample {self.sample} at {list(self.index)}: '
            f"expected {self.expected}, got {self.got}"
        )


class GoldenDifference(BundleError):
    """A bundle runs, but its outputs differ from its golden samples."""


def encode(golden: Golden) -> bytes:
    """The contents of ``golden.npz``.

    Raises:
        BundleError: larger than `archives.MAX_UNPACKED_BYTES`.
    """
    check_unpacked(sum(len(tensor.raw) for tensor in (*golden.inputs, *golden.outputs, *golden.rows)), GOLDEN_FILE)
    arrays: dict[str, Array] = {}
    for side, tensors in (("inputs", golden.inputs), ("outputs", golden.outputs), ("rows", golden.rows)):
        for tensor in tensors:
            if tensor.datatype in _RAW_DATATYPES:
                arrays[f"{side}/{tensor.name}"] = np.frombuffer(tensor.raw, dtype=np.uint8)
                arrays[f"{side}_shapes/{tensor.name}"] = np.array(tensor.shape, dtype=np.int64)
            else:
                arrays[f"{side}/{tensor.name}"] = to_array(tensor)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def decode(data: bytes, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], rows: Sequence[TensorSpec] = ()) -> Golden:
    """The samples in ``golden.npz``.

    Raises:
        BundleError: not an npz file, too large unpacked, more rows than `MAX_ROWS`, or a tensor of the signature is missing.
    """
    try:
        check_npz(data, GOLDEN_FILE)
        _check_n_rows(data)
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return Golden(
                inputs=tuple(_tensor(arrays, "inputs", spec) for spec in inputs),
                outputs=tuple(_tensor(arrays, "outputs", spec) for spec in outputs),
                rows=tuple(_tensor(arrays, "rows", spec) for spec in rows),
            )
    except BundleError:
        raise
    except KeyError as error:
        raise BundleError(f"{GOLDEN_FILE}: {error.args[0]}") from None
    except Exception as error:  # numpy, zipfile and zlib each raise their own for a damaged file
        raise BundleError(f"{GOLDEN_FILE}: not an npz file of plain arrays: {error}") from None


def _check_n_rows(data: bytes) -> None:
    """Read the arrays' headers, before any array is made.

    Raises:
        BundleError: an array has more rows than `MAX_ROWS`.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for member in archive.infolist():
            side, _, name = member.filename.removesuffix(".npy").partition("/")
            with archive.open(member) as file:
                shape = _shape(file)
            if side.endswith("_shapes") or f"{side}_shapes/{name}.npy" in archive.NameToInfo:
                continue  # wire bytes of a tensor: its rows are checked when it is made
            if shape and shape[0] > MAX_ROWS:
                raise BundleError(f'{GOLDEN_FILE}: "{name[:64]}": expected at most {MAX_ROWS} rows, got {shape[0]}')


def _shape(file: IO[bytes]) -> tuple[int, ...]:
    """Of the array in a npy file. Source: numpy.lib.format."""
    major, _ = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    shape: tuple[int, ...] = read(file)[0]
    return shape


def _tensor(arrays: Mapping[str, Array], side: str, spec: TensorSpec) -> Tensor:
    array = arrays[f"{side}/{spec.name}"]
    if spec.datatype in _RAW_DATATYPES:
        shape = tuple(int(size) for size in arrays[f"{side}_shapes/{spec.name}"])
        if shape and shape[0] > MAX_ROWS:
            raise BundleError(f'{GOLDEN_FILE}: "{spec.name}": expected at most {MAX_ROWS} rows, got {shape[0]}')
        return Tensor(spec.name, spec.datatype, shape, array.tobytes())
    return from_array(spec.name, array)


def replay(data: bytes, manifest: Manifest, run: Callable[[tuple[Tensor, ...]], Sequence[Tensor]]) -> None:
    """Run a bundle's golden samples and compare the outputs.

    Args:
        data: the contents of ``golden.npz``.
        manifest: of the bundle: signature and tolerances.
        run: the loaded bundle.

    Raises:
        GoldenDifference: an output differs beyond its tolerance; the message shows the worst difference.
        BundleError: the samples are damaged, do not have the signature, or cannot be run.
    """
    golden = decode(data, manifest.inputs, manifest.outputs)
    for tensor, spec in zip((*golden.inputs, *golden.outputs), (*manifest.inputs, *manifest.outputs), strict=True):
        if tensor.datatype != spec.datatype:
            raise BundleError(
                f'{GOLDEN_FILE}: "{spec.name}": expected {spec.datatype} as in manifest.json, got {tensor.datatype}'
            )
    check(golden, manifest, run)


def check(golden: Golden, manifest: Manifest, run: Callable[[tuple[Tensor, ...]], Sequence[Tensor]]) -> None:
    """As `replay`, for decoded samples.

    Raises:
        GoldenDifference: an output differs beyond its tolerance.
        BundleError: the samples cannot be run.
    """
    refuse_large_tolerances(golden.outputs, manifest.tolerances, bounds_of(manifest))
    if any(tensor.shape[:1] == (0,) for tensor in golden.inputs):
        raise BundleError(f"{GOLDEN_FILE}: expected at least one sample, got none; publish the bundle again")
    if reason := not_finite_reason(golden.outputs):
        raise BundleError(f"{GOLDEN_FILE}: {reason}; publish the bundle again")
    try:
        found = run(golden.inputs)
    except SplitserveError as error:
        raise BundleError(f"golden samples: {error.message}") from error
    if worst := worst_difference(golden.outputs, found, manifest.tolerances):
        raise GoldenDifference(str(worst))


def refuse_large_tolerances(
    outputs: Sequence[Tensor], tolerances: Mapping[str, Tolerance], bounds: Mapping[str, float] = BOUNDS
) -> None:
    """Tolerances are fixed bounds of the datatype, relative to the output's scale. Larger ones would hide a difference.

    Args:
        outputs: the golden ones.
        tolerances: of the manifest.
        bounds: by datatype.

    Raises:
        BundleError: one is larger than its bound.
    """
    for tensor in outputs:
        tolerance = tolerances.get(tensor.name)
        if tolerance is None:
            continue
        bound = bounds.get(tensor.datatype, 0.0)
        relative = tolerance.rtol + tolerance.atol / scale_of(to_array(tensor))
        if not 0 <= relative <= bound * _ROUNDING:
            raise BundleError(
                f'the tolerance of output "{tensor.name}" is {relative:.2g} of its scale, more than {bound:.0e}, '
                f"the limit for {tensor.datatype}; publish it again"
            )


def not_finite_reason(outputs: Sequence[Tensor]) -> str:
    """Which output has no finite number in any row; "" if none."""
    for tensor in outputs:
        array = to_array(tensor)
        if array.dtype.kind == "f" and array.size and not np.isfinite(array).any():
            return f'output "{tensor.name}" is not finite in any row'
    return ""


def scale_of(array: Array) -> float:
    """The largest finite magnitude; 1 where there is none, or all are 0."""
    if array.dtype.kind not in "fiu":
        return 1.0
    magnitudes = np.abs(array[np.isfinite(array)].astype(np.float64))
    return float(magnitudes.max(initial=0.0)) or 1.0


def bounds_of(manifest: Manifest) -> Mapping[str, float]:
    """The bounds of a bundle's tolerances, by datatype."""
    return dict.fromkeys(BOUNDS, QUANTISED_BOUND) if manifest.is_quantised else BOUNDS


def worst_difference(expected: Sequence[Tensor], got: Sequence[Tensor], tolerances: Mapping[str, Tolerance]) -> Difference | None:
    """The element that exceeds its tolerance most; None if all are within tolerance.

    NaN equals NaN. An output that is missing, or has another datatype or shape, is a difference.
    """
    by_name = {tensor.name: tensor for tensor in got}
    worst, excess = None, 0.0
    for want in expected:
        have = by_name.get(want.name)
        if have is None or (have.datatype, have.shape) != (want.datatype, want.shape):
            found = f"{have.datatype} {list(have.shape)}" if have else "nothing"
            return Difference(want.name, 0, (), f"{want.datatype} {list(want.shape)}", found)
        found_excess, index = _excess(to_array(want), to_array(have), tolerances.get(want.name, Tolerance()))
        if found_excess > excess:
            excess = found_excess
            worst = Difference(want.name, index[0] if index else 0, index, str(to_array(want)[index]), str(to_array(have)[index]))
    return worst


def error_ratio(expected: Sequence[Tensor], got: Sequence[Tensor], tolerances: Mapping[str, Tolerance]) -> float:
    """The largest difference relative to its tolerance: up to 1 is within it.

    Infinite where anything differs that has no tolerance, or cannot be subtracted.
    """
    by_name = {tensor.name: tensor for tensor in got}
    worst = 0.0
    for want in expected:
        have = by_name.get(want.name)
        if have is None or (have.datatype, have.shape) != (want.datatype, want.shape):
            return np.inf
        worst = max(worst, _ratio(to_array(want), to_array(have), tolerances.get(want.name, Tolerance())))
    return worst


def _ratio(want: Array, have: Array, tolerance: Tolerance) -> float:
    if want.dtype.kind != "f":
        return 0.0 if np.array_equal(want, have) else np.inf
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        wide_want, wide_have = want.astype(np.float64), have.astype(np.float64)
        ratio = np.abs(wide_have - wide_want) / (tolerance.atol + tolerance.rtol * np.abs(wide_want))
    same = (wide_want == wide_have) | (np.isnan(wide_want) & np.isnan(wide_have))
    return float(np.where(same, 0.0, np.where(np.isnan(ratio), np.inf, ratio)).max(initial=0.0))


def _excess(want: Array, have: Array, tolerance: Tolerance) -> tuple[float, tuple[int, ...]]:
    """By how much the worst element exceeds the tolerance, and its index; infinite where values cannot be subtracted."""
    if want.size == 0:
        return 0.0, ()
    if want.dtype.kind == "f":
        with np.errstate(invalid="ignore", over="ignore"):
            wide_want, wide_have = want.astype(np.float64), have.astype(np.float64)
            beyond = np.abs(wide_have - wide_want) - (tolerance.atol + tolerance.rtol * np.abs(wide_want))
        same = (wide_want == wide_have) | (np.isnan(wide_want) & np.isnan(wide_have))
        beyond = np.where(same, 0.0, np.where(np.isnan(beyond), np.inf, beyond))
    else:
        beyond = np.where(want == have, 0.0, np.inf)
    at = int(np.argmax(beyond))
    return float(beyond.flat[at]), tuple(int(axis) for axis in np.unravel_index(at, want.shape))
