"""Fitted transforms -> an equal ONNX model, proven on golden samples and on generated edge cases."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
from onnx import TensorProto
from skl2onnx import convert_sklearn
from skl2onnx.common.data_types import DoubleTensorType, FloatTensorType, StringTensorType
from sklearn.impute import SimpleImputer

from splitserve.arrays import Array, from_array, objects, to_array
from splitserve.errors import InvalidInput, SplitserveError
from splitserve.repository import golden as goldens
from splitserve.repository.golden import Golden
from splitserve.repository.manifest import BundleError, Compiled, Manifest
from splitserve.runtimes.compiled import CompiledTransforms
from splitserve.runtimes.meaning import parts
from splitserve.runtimes.preprocessor import Preprocessor
from splitserve.signature import TensorSpec
from splitserve.tensors import Tensor

N_RANDOM = 200
"""Rows with edge cases mixed at random, in addition to rows with one edge case each."""

N_ONE_BY_ONE = 64
"""Up to so many columns get edge cases one by one; of more, several do at a time, so that the number of rows does not grow."""

_N_TRIED_ALONE = 8
"""Up to so many rows are tried one by one when they are rejected together: mostly several are the reason, e.g. unknown text."""

_SEED = 0
_ODD_FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-30, 1e6, -1e6, 3e38, -3e38, np.nan, np.inf, -np.inf)
_ODD_TEXTS = ("", " ", "never seen", "NaN", "nan", "None", "0", "é", "中文 x", "two words", "UPPER lower", "a-b, c! 12")

Transform = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]


class _NotCompiled(Exception):
    """There is no compiled form; the message says why."""


def compile_transforms(transformer: Any, manifest: Manifest, golden: Golden) -> tuple[bytes, Compiled]:
    """The model's bytes, ``b""`` if there is none, and the result for the manifest.

    Args:
        transformer: fitted.
        manifest: of its bundle, with tolerances.
        golden: its samples.
    """
    try:
        model = _convert(transformer, manifest)
        bare = msgspec.structs.replace(manifest, refuses="")  # a check of the features, which the comparison does not need
        compiled = Preprocessor(bare, None, CompiledTransforms(model, manifest))
        goldens.check(golden, manifest, compiled.transform)
        n_checked, worst = _prove(manifest, golden, Preprocessor(bare, transformer).transform, compiled.transform)
    except (_NotCompiled, BundleError, SplitserveError, ValueError) as error:
        return b"", Compiled(reason=" ".join(str(error).split())[:300])
    return model, Compiled(is_equal=True, n_checked=n_checked, worst_difference=worst)


def _convert(transformer: Any, manifest: Manifest) -> bytes:
    types = list(_input_types(manifest))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = convert_sklearn(
                _with_empty_text(transformer),
                initial_types=types,
                custom_conversion_functions={SimpleImputer: _convert_imputer},
                custom_shape_calculators={SimpleImputer: _shape_of_imputed},
            )
    except Exception as error:  # skl2onnx's converters may raise anything
        raise _NotCompiled(f"skl2onnx cannot convert the transforms: {error}") from error
    if len(model.graph.output) != 1:
        raise _NotCompiled(f"skl2onnx gives {len(model.graph.output)} outputs, expected one")
    data: bytes = model.SerializeToString()
    return data


def _shape_of_imputed(operator: Any) -> None:
    """For skl2onnx: the output has the input's type."""
    operator.outputs[0].type = operator.inputs[0].type.__class__([None, len(operator.raw_operator.statistics_)])


def _convert_imputer(scope: Any, operator: Any, container: Any) -> None:
    """For skl2onnx: an imputer in operators that ONNX Runtime supports for float64 and text, unlike ``Imputer``."""
    imputer = operator.raw_operator
    fills, is_text = imputer.statistics_, isinstance(operator.inputs[0].type, StringTensorType)
    is_text_fitted = imputer._fit_dtype.kind == "O"
    if imputer.add_indicator or is_text != is_text_fitted or any(_is_nan(fill) for fill in fills.tolist()):
        raise _NotCompiled("this imputer's parameters are not supported")
    if not is_text and not _is_nan(imputer.missing_values):
        raise _NotCompiled("an imputer of other values than NaN is not supported")
    kind = {StringTensorType: TensorProto.STRING, FloatTensorType: TensorProto.FLOAT}
    element = kind.get(type(operator.inputs[0].type), TensorProto.DOUBLE)
    name, given, gap = (scope.get_unique_variable_name(each) for each in ("fills", "missing", "gap"))
    words = [fill.encode() for fill in fills.tolist()] if is_text else fills.tolist()
    container.add_initializer(name, element, [1, len(words)], words)
    source, result = operator.inputs[0].full_name, operator.outputs[0].full_name
    if is_text:
        container.add_initializer(gap, element, [1], [imputer.missing_values.encode()])
        container.add_node("Equal", [source, gap], given, op_version=19, name=scope.get_unique_operator_name("Equal"))
    else:
        container.add_node("IsNaN", source, given, op_version=13, name=scope.get_unique_operator_name("IsNaN"))
    container.add_node("Where", [given, name, source], result, op_version=16, name=scope.get_unique_operator_name("Where"))


def _input_types(manifest: Manifest) -> Iterator[tuple[str, Any]]:
    """Text or float64; an array of float32 stays float32, in which scikit-learn computes, too."""
    for spec in manifest.inputs:
        inner = [size if isinstance(size, int) else None for size in spec.shape[1:]]
        kind = {"BYTES": StringTensorType, "FP32": FloatTensorType}.get(spec.datatype, DoubleTensorType)
        if kind is FloatTensorType and manifest.rows is not None and manifest.rows.form == "frame":
            kind = DoubleTensorType
        yield spec.name, kind([None, *inner])


def _with_empty_text(transformer: Any) -> Any:
    """A copy in which missing text is the empty string, as on the wire: ONNX has no missing text."""
    changed = copy.deepcopy(transformer)
    for part in _all_parts(changed):
        categories: Any = getattr(part, "categories_", ())
        for index, words in enumerate(categories):
            if words.dtype.kind == "O" and "" not in words.tolist():
                categories[index] = objects(["" if _is_nan(word) else word for word in words.tolist()], words.shape)
        if getattr(getattr(part, "_fit_dtype", None), "kind", "") == "O" and _is_nan(part.missing_values):
            part.missing_values = ""
    return changed


def _all_parts(transformer: Any) -> Iterator[Any]:
    yield transformer
    for part in parts(transformer):
        yield from _all_parts(part)


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and value != value


def _prove(manifest: Manifest, golden: Golden, original: Transform, compiled: Transform) -> tuple[int, float]:
    """Compare on generated rows, including which rows are rejected.

    Returns:
        The number of rows, and the largest difference between finite numbers.

    Raises:
        _NotCompiled: they differ beyond the tolerances.
    """
    inputs = odd_rows(manifest.inputs, golden)
    n_rows, worst = inputs[0].n_rows, 0.0
    with np.errstate(all="ignore"):
        wanted, found = list(_outcomes(original, inputs)), list(_outcomes(compiled, inputs))
    for row, (want, have) in enumerate(zip(wanted, found, strict=True)):
        if want is None or have is None:
            if want is not have:
                who, other = ("compiled form", "transforms") if have is None else ("transforms", "compiled form")
                raise _NotCompiled(f"the {who} reject a row that the {other} accept: {_shown(inputs, row)}")
        elif difference := goldens.worst_difference((want,), (have,), manifest.tolerances):
            raise _NotCompiled(f"{difference} for {_shown(inputs, row)}".replace("golden sample 0", "a row"))
        else:
            worst = max(worst, _difference(to_array(want), to_array(have)))
    return n_rows + golden.inputs[0].n_rows, worst


def _shown(inputs: Sequence[Tensor], row: int) -> str:
    return ", ".join(f'"{tensor.name}" {to_array(_rows(tensor, row, row + 1)).ravel()[:8]}' for tensor in inputs)


def _difference(one: Array, other: Array) -> float:
    if one.dtype.kind != "f":
        return 0.0
    with np.errstate(all="ignore"):
        differences = np.abs(one.astype(np.float64) - other.astype(np.float64))
    return float(differences[np.isfinite(differences)].max(initial=0.0))


def _outcomes(transform: Transform, inputs: Sequence[Tensor]) -> Iterator[Tensor | None]:
    """The features of each row, None if it is rejected: blocks are divided to find the rejected rows."""
    n_rows = inputs[0].n_rows
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output = transform(inputs)[0]
    except InvalidInput:
        if n_rows == 1:
            yield None
            return
        middle = n_rows // 2
        ends = range(n_rows + 1) if n_rows <= _N_TRIED_ALONE else (0, middle, n_rows)
        for first, last in itertools.pairwise(ends):
            yield from _outcomes(transform, [_rows(tensor, first, last) for tensor in inputs])
        return
    for row in range(n_rows):
        yield _rows(output, row, row + 1)


def _rows(tensor: Tensor, first: int, last: int) -> Tensor:
    return from_array(tensor.name, to_array(tensor)[first:last], tensor.datatype)


def odd_rows(specs: Sequence[TensorSpec], golden: Golden) -> tuple[Tensor, ...]:
    """Rows with edge cases, the same in every run: extremes, missing values, unknown text.

    Golden samples with one value (of many columns, some) replaced by each edge case of its column, then random mixtures.
    """
    random = np.random.default_rng(_SEED)
    arrays = [to_array(tensor).reshape(tensor.n_rows, -1) for tensor in golden.inputs]
    odd: list[list[Any]] = [_odd_values(spec, array) for spec, array in zip(specs, arrays, strict=True)]
    made: list[list[Array]] = []
    infinite: list[list[Array]] = []  # at the end, so that they are found with few calls
    n_golden = golden.inputs[0].n_rows
    places = [(which, place) for which, array in enumerate(arrays) for place in range(array.shape[1])]
    n_groups = min(len(places), N_ONE_BY_ONE if len(places) <= N_ONE_BY_ONE else max(1, N_ONE_BY_ONE**2 // len(places)))
    for group in (places[start::n_groups] for start in range(n_groups)):
        for turn in range(max(len(odd[which]) for which, _ in group)):
            row: list[Array] = [each[(len(made) + len(infinite)) % n_golden].copy() for each in arrays]
            values = [odd[which][turn % len(odd[which])] for which, _ in group]
            for (which, place), value in zip(group, values, strict=True):
                row[which][place] = value
            (infinite if any(map(_is_infinite, values)) else made).append(row)
    ordinary = [[value for value in values if not _is_infinite(value)] for values in odd]
    for _ in range(N_RANDOM):
        start = int(random.integers(n_golden))
        row = [each[start].copy() for each in arrays]
        for values, each in zip(ordinary, row, strict=True):
            for chosen in np.flatnonzero(random.random(each.size) < 0.3).tolist():
                each[chosen] = values[random.integers(len(values))]
        made.append(row)
    made += infinite
    columns = (np.stack([row[which] for row in made]) for which in range(len(specs)))
    return tuple(
        from_array(spec.name, column.reshape(len(made), *tensor.shape[1:]), spec.datatype)
        for spec, tensor, column in zip(specs, golden.inputs, columns, strict=True)
    )


def _is_infinite(value: object) -> bool:
    return isinstance(value, float) and bool(np.isinf(value))


def _odd_values(spec: TensorSpec, array: Array) -> list[Any]:
    if spec.datatype == "BYTES":
        return [*(text.encode() for text in _ODD_TEXTS), *dict.fromkeys(array.ravel().tolist()[:20])]
    if array.dtype.kind == "f":
        most = float(np.finfo(array.dtype).max)
        return [value for value in (*_ODD_FLOATS, most, -most) if not np.isfinite(value) or abs(value) <= most]
    if array.dtype.kind == "b":
        return [False, True]
    bounds = np.iinfo(array.dtype)
    return [0, 1, 100, bounds.min, bounds.max]
