"""Proof that the split answers as the pipeline does, on rows of the training data and on hard ones.

A row that the pipeline refuses is not compared; the service refuses it too, or answers where scikit-learn would not have. A row
that the pipeline answers must be answered by the split, unless it has infinite values, which services refuse.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import msgspec
import numpy as np
from scipy.sparse import csr_matrix
from threadpoolctl import threadpool_limits

from splitserve.arrays import DTYPES, Array, from_array, to_array
from splitserve.errors import SplitserveError
from splitserve.publishing import hard_rows, samples
from splitserve.publishing.agreement import Scale, compare, expected_answer, larger, split_answer
from splitserve.publishing.convert import ModelOutput
from splitserve.publishing.halves import PredictorHalf, PreprocessorHalf
from splitserve.publishing.hard_rows import FAR_KINDS, MIXED, Block, HardRows
from splitserve.publishing.proof import row_wise_difference, threads_difference
from splitserve.repository import golden as goldens
from splitserve.repository.manifest import MODEL_FILE
from splitserve.runtimes.predictor import Predictor
from splitserve.runtimes.preprocessor import to_dense
from splitserve.runtimes.rows import to_rows
from splitserve.tensors import Tensor

N_TOGETHER = 192
"""Hard rows that are run alone, merged, permuted and repeated, and with several threads."""

_N_THREADS = 4
"""Threads of the model that is compared with one thread."""

_N_TRIED = 6
"""If so many rows of a part are refused one by one, the whole part is."""

_N_ULPS = 4
"""Numbers far from the training data are moved by so many units in the last place, to see whether the pipeline's answer depends
on rounding."""

Arrays = tuple[Array, ...]
"""Raw rows, an array for each input, or feature rows, one array."""

Outputs = Mapping[str, Array]
Answering = Callable[[Arrays], Outputs]


class ComparisonOutcome(msgspec.Struct, frozen=True):
    """What was compared: hard rows by kind, the largest one of each output; ``difference`` is "" if the answers are
    equal.
    """

    hard_rows: dict[str, int]
    worst: dict[str, float]
    difference: str = ""


class HardRowComparison:
    """Compares a split with a pipeline on hard rows.

    Args:
        pipeline: fitted.
        preprocessor: its one half, loaded.
        predictor: its other half, loaded.
        transformer: what the preprocessor was made from: the pipeline's transforms, and possibly codes of categories.
        estimator: what the predictor was made from: the pipeline's, or a copy that takes codes instead of categories.
        tensors: rows of the training data, by the inputs of the signature.
        outputs: of the estimator.
        tolerance: as for `publish`.
        scales: of the answers to the training data.
        is_sparse: whether the transforms give the estimator a sparse matrix.
        tick: called between comparisons, with what is compared next.
    """

    def __init__(
        self,
        pipeline: Any,
        preprocessor: PreprocessorHalf,
        predictor: PredictorHalf,
        transformer: Any,
        estimator: Any,
        tensors: Sequence[Tensor],
        *,
        outputs: Sequence[ModelOutput],
        tolerance: float,
        scales: Mapping[str, Scale],
        is_sparse: bool = False,
        tick: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._preprocessor, self._predictor = preprocessor, predictor
        self._tensors, self._outputs, self._tolerance, self._scales = tensors, outputs, tolerance, scales
        self._specs, self._output = preprocessor.manifest.inputs, preprocessor.manifest.outputs[0]
        self._last, self._transformer, self._estimator = pipeline.steps[-1][1], transformer, estimator
        self._transforms = pipeline[:-1] if len(pipeline.steps) > 1 else None  # once for all methods of the estimator
        self._is_sparse, self._tick = is_sparse, tick

    def run(self, *, is_row_wise: bool) -> ComparisonOutcome:
        """Compare raw rows through the whole, then feature rows through the predictor.

        Args:
            is_row_wise: also compare rows alone, merged, permuted and repeated.
        """
        with warnings.catch_warnings(), threadpool_limits(1):  # many small calls, which threads only slow down
            warnings.simplefilter("ignore")  # scikit-learn's, about values that are made to be strange
            return self._run(is_row_wise)

    def _run(self, is_row_wise: bool) -> ComparisonOutcome:
        counts: Counter[str] = Counter()
        worst, kept = dict[str, float](), list[Arrays]()
        levels: list[tuple[Iterator[Block], Answering, Answering, str]] = [
            (self._raw_blocks(), self._by_pipeline, self._by_split, ""),
            (self._feature_blocks(), self._by_estimator, self._by_predictor, "features"),
        ]
        for blocks, original, split, level in levels:
            for block in blocks:
                self._tick(block.kind)
                rows, of_block, difference = self._compared(block, original, split)
                if difference:
                    return ComparisonOutcome(dict(counts), worst, difference)
                counts[f"{block.kind} ({level})" if level else block.kind] += len(rows[0])
                worst = larger(worst, of_block)
                if not level and len(rows[0]):
                    kept.append(rows)
        difference = self._together(kept) if kept and is_row_wise else ""
        return ComparisonOutcome({kind: count for kind, count in counts.items() if count}, worst, difference)

    def _raw_blocks(self) -> Iterator[Block]:
        made = hard_rows.of_raw(self._tensors, self._preprocessor.rows, self._specs)
        yield from made.blocks()
        if self._splits and (block := self._raw_thresholds(made)):
            yield block

    @cached_property
    def _splits(self) -> list[tuple[int, float]]:
        return hard_rows.splits_of(self._estimator, self._output.wire_shape[1], self._predictor.files[MODEL_FILE])

    def _raw_thresholds(self, made: HardRows) -> Block | None:
        def features(arrays: list[Array]) -> Array:
            rows = self._rows(tuple(arrays))
            return np.asarray(to_dense(self._transformer.transform(rows)), np.float64)

        try:
            return made.thresholds(features, self._splits)
        except Exception:  # the transforms refuse values that lie between those of the training data
            return None

    def _feature_blocks(self) -> Iterator[Block]:
        inputs = self._preprocessor.runtime.transform(self._tensors)
        features = to_array(inputs[0])
        if features.ndim != 2 or features.dtype.kind != "f" or not len(features):
            return
        block = hard_rows.feature_thresholds(features, self._splits)
        if block is not None:
            yield block
        for made in hard_rows.of_features(features).blocks():
            if made.kind in ("missing", "zeros", "extremes", MIXED):
                yield made

    def _compared(self, block: Block, original: Answering, split: Answering) -> tuple[Arrays, dict[str, float], str]:
        """The rows that were compared, the largest difference of each output, and the message about one that is too large."""
        if block.kind in FAR_KINDS:
            block = self._determined(block, original)
        expected, answered, _ = _answered(original, block.arrays, Exception)
        rows = _taken(block.arrays, answered)
        found, places, refused = _answered(split, rows, SplitserveError)
        if len(places) < len(answered) and block.kind != "infinite":
            return rows, {}, _refusal(block, answered, refused)
        answered, rows = answered[places], _taken(rows, places)
        if not len(answered):
            return rows, {}, ""
        expected = _of_rows(expected, places)
        worst, difference = compare(found, expected, self._tolerance, precision=self._output.datatype, scales=self._scales)
        if difference:
            difference = self._with_row(difference, block, answered, found, expected)
        return rows, worst, difference

    def _with_row(self, difference: str, block: Block, answered: Array, found: Outputs, expected: Outputs) -> str:
        """The message about a difference, with what is special about its row."""
        for place, row in enumerate(answered.tolist()):
            have, want = (_of_rows(side, [place]) for side in (found, expected))
            alone = compare(
                have, want, self._tolerance, precision=self._output.datatype, scales=self._scales, row_name=lambda _: "a hard row"
            )[1]
            if alone:
                return f"{alone} (row {row} of the kind {block.kind}: {block.shown[row]})"
        return difference

    def _determined(self, block: Block, original: Answering) -> Block:
        """Without rows that the pipeline itself answers differently when their numbers move by a few units in the last place."""
        kept = np.ones(block.n_rows, bool)
        want, answered, _ = _answered(original, block.arrays, Exception)
        if not len(answered):
            return block
        rows = _taken(block.arrays, answered)
        for sign in (1, -1):
            moved = tuple(_moved(array, sign) for array in rows)
            have, places, _ = _answered(original, moved, Exception)
            for place, row in enumerate(places.tolist()):
                one, other = _of_rows(have, [place]), _of_rows(want, [row])
                if compare(one, other, self._tolerance / 10, precision="FP32", scales=self._scales)[1]:
                    kept[answered[row]] = False
        return Block(
            block.kind,
            _taken(block.arrays, kept),
            tuple(shown for shown, is_kept in zip(block.shown, kept.tolist(), strict=True) if is_kept),
        )

    def _together(self, kept: Sequence[Arrays]) -> str:
        """Whether hard rows are answered the same alone, merged, permuted, repeated, and with several threads."""
        self._tick("batches and threads")
        joined = tuple(np.concatenate(parts) for parts in zip(*kept, strict=True))
        chosen = samples.spread(len(joined[0]), N_TOGETHER)
        inputs = self._tensors_of(_taken(joined, chosen))
        features = self._preprocessor.runtime.transform(inputs)
        bounds = goldens.bounds_of(self._predictor.manifest)
        one = self._predictor.runtime.infer
        if difference := row_wise_difference(one, features, bounds):
            return f"on hard rows, {difference}"
        several = Predictor(self._predictor.files[MODEL_FILE], intra_op_num_threads=_N_THREADS).infer
        difference = threads_difference(one, several, features, bounds)
        return f"on hard rows, {difference}" if difference else ""

    def _tensors_of(self, arrays: Arrays) -> tuple[Tensor, ...]:
        return tuple(from_array(spec.name, array, spec.datatype) for spec, array in zip(self._specs, arrays, strict=True))

    def _rows(self, arrays: Arrays) -> Any:
        return to_rows(self._preprocessor.rows, self._specs, self._tensors_of(arrays))

    def _by_pipeline(self, arrays: Arrays) -> Outputs:
        rows = self._rows(arrays)
        features = self._transforms.transform(rows) if self._transforms is not None else rows
        return expected_answer(self._last, features, self._outputs)

    def _by_split(self, arrays: Arrays) -> Outputs:
        return split_answer(self._preprocessor, self._predictor, self._tensors_of(arrays))

    def _by_estimator(self, arrays: Arrays) -> Outputs:
        features = arrays[0].astype(np.float64)
        return expected_answer(self._estimator, csr_matrix(features) if self._is_sparse else features, self._outputs)

    def _by_predictor(self, arrays: Arrays) -> Outputs:
        features = arrays[0].astype(DTYPES[self._output.datatype])
        self._preprocessor.runtime.check_values(features)
        tensor = from_array(self._predictor.runtime.inputs[0].name, features)
        return {tensor.name: to_array(tensor) for tensor in self._predictor.runtime.infer((tensor,))}


def _taken(arrays: Arrays, rows: Array | Sequence[int]) -> Arrays:
    return tuple(array[rows] for array in arrays)


def _of_rows(outputs: Outputs, rows: Array | Sequence[int]) -> Outputs:
    return {name: values[rows] for name, values in outputs.items()}


def _moved(array: Array, sign: int) -> Array:
    if array.dtype.kind != "f":
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        moved: Array = (array * (1 + sign * _N_ULPS * np.finfo(array.dtype).eps)).astype(array.dtype)
    return moved


def _refusal(block: Block, answered: Array, refused: Mapping[int, str]) -> str:
    """The message about the first row of ``answered`` that the split refused."""
    place = min(refused)
    return f"the split refuses a row that the pipeline answers ({block.kind}: {block.shown[answered[place]]}): {refused[place]}"


def _answered(answer: Answering, arrays: Arrays, refusals: type[Exception]) -> tuple[Outputs, Array, dict[int, str]]:
    """The answers to the rows that are not refused, the numbers of these rows, and why rows were refused alone.

    Rows are halved to find those that are refused; if `_N_TRIED` evenly spread rows are all refused, so are the others, without
    being tried.
    """
    n_rows = len(arrays[0])
    parts: list[tuple[Array, Outputs]] = []
    refused: dict[int, str] = {}
    if n_rows:
        _halve(answer, arrays, np.arange(n_rows), refusals, parts, refused)
    if not parts:
        return {}, np.array([], np.int64), refused
    rows = np.concatenate([rows for rows, _ in parts])
    return {name: np.concatenate([part[name] for _, part in parts]) for name in parts[0][1]}, rows, refused


def _halve(
    answer: Answering,
    arrays: Arrays,
    rows: Array,
    refusals: type[Exception],
    parts: list[tuple[Array, Outputs]],
    refused: dict[int, str],
) -> None:
    try:
        with np.errstate(all="ignore"):
            parts.append((rows, answer(_taken(arrays, rows))))
            return
    except refusals as error:
        if len(rows) == 1:
            refused[int(rows[0])] = str(error)
            return
    if len(rows) > 2 * _N_TRIED:
        tried = [rows[index] for index in samples.spread(len(rows), _N_TRIED)]
        alone: list[tuple[Array, Outputs]] = []
        for row in tried:
            _halve(answer, arrays, np.array([row]), refusals, alone, refused)
        if not alone:
            return
    for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
        _halve(answer, arrays, half, refusals, parts, refused)
