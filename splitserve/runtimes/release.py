"""The whole of a release in one place: transform, predict, postprocess, without a transport.

Publishing, releasing, the matrix, verification and batch scoring run a pair with it; services run the same three steps with the
wire in between. It imports neither scikit-learn nor ONNX Runtime: the caller loads the halves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from splitserve.repository import golden as goldens
from splitserve.repository.golden import Golden, GoldenDifference
from splitserve.repository.manifest import BOUNDS, GOLDEN_FILE, QUANTISED_BOUND, BundleError
from splitserve.repository.release import ReleaseManifest
from splitserve.signature import TensorSpec, check_outputs
from splitserve.signature import is_row_wise as has_rows
from splitserve.tensors import Tensor

if TYPE_CHECKING:
    from splitserve.runtimes.preprocessor import Preprocessor

_WIDEST_BOUNDS = dict.fromkeys(BOUNDS, QUANTISED_BOUND)
"""The record does not say whether the predictor is quantised."""


class RunsTensors(Protocol):
    """A loaded predictor."""

    @property
    def inputs(self) -> Sequence[TensorSpec]: ...

    @property
    def outputs(self) -> Sequence[TensorSpec]: ...

    def infer(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Tensors (n_rows, …) -> outputs (n_rows, …)."""
        ...


class WholeRelease:
    """A loaded preprocessor with a loaded predictor.

    Args:
        preprocessor: transforms and postprocesses.
        predictor: runs the model.
        is_row_wise: what both manifests say: an answer depends on its own row alone.
        is_quantised: the model computes with 8 bit integers.

    Raises:
        BundleError: the halves do not fit.
    """

    def __init__(
        self, preprocessor: Preprocessor, predictor: RunsTensors, *, is_row_wise: bool = True, is_quantised: bool = False
    ) -> None:
        if differences := preprocessor.differences(predictor.inputs, predictor.outputs):
            raise BundleError(f"the halves do not fit: {'; '.join(differences)}")
        self.preprocessor = preprocessor
        self.predictor = predictor
        self.inputs: tuple[TensorSpec, ...] = tuple(preprocessor.inputs)
        self.outputs: tuple[TensorSpec, ...] = preprocessor.answer_specs(predictor.outputs)
        self.is_row_wise = is_row_wise and has_rows(self.inputs, self.outputs)
        self.is_quantised = is_quantised

    def features(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Raw rows (n_rows, …) -> the predictor's inputs (n_rows, …), by the predictor's names.

        Raises:
            InvalidInput: a tensor does not fit the signature, or the transforms refuse a value.
            PairMismatch: the transforms' output contradicts the manifest.
        """
        return self.preprocessor.sent(self.preprocessor.transform(inputs))

    def infer(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Raw rows (n_rows, …) -> the answer (n_rows, …), as a client of the services gets it.

        Raises:
            InvalidInput: a tensor does not fit the signature, or a stage refuses a value.
            PairMismatch: a stage's output contradicts its manifest.
        """
        return self.answer(self.features(inputs))

    def answer(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The predictor's inputs (n_rows, …) -> the answer (n_rows, …).

        Raises:
            InvalidInput: the predictor refuses a value.
            PairMismatch: the predictor's output contradicts its signature.
        """
        outputs = tuple(self.predictor.infer(features))
        check_outputs(self.predictor.outputs, outputs, features[0].n_rows)
        return self.preprocessor.answer(outputs)


def golden_of(manifest: ReleaseManifest, data: bytes) -> Golden:
    """The golden samples of a release: raw rows and the answers of the whole.

    Args:
        manifest: of the release.
        data: the contents of its ``golden.npz``.

    Raises:
        BundleError: not such a file, not of the release's signature, or it proves nothing: no rows, no finite answer, or
            tolerances beyond all bounds.
    """
    golden = goldens.decode(data, manifest.inputs, manifest.outputs)
    for tensor, spec in zip((*golden.inputs, *golden.outputs), (*manifest.inputs, *manifest.outputs), strict=True):
        if tensor.datatype != spec.datatype:
            raise BundleError(f'{GOLDEN_FILE}: "{spec.name}": expected {spec.datatype} as in the manifest, got {tensor.datatype}')
    if any(tensor.shape[:1] == (0,) for tensor in golden.inputs):
        raise BundleError(f"{GOLDEN_FILE}: expected at least one row, got none")
    if reason := goldens.not_finite_reason(golden.outputs):
        raise BundleError(f"{GOLDEN_FILE}: {reason}")
    goldens.refuse_large_tolerances(golden.outputs, manifest.tolerances, _WIDEST_BOUNDS)
    return golden


def check_answer(manifest: ReleaseManifest, golden: Golden, answer: Sequence[Tensor]) -> None:
    """Compare the answer to the golden rows with the recorded one.

    Raises:
        GoldenDifference: an output is missing, or differs by more than the release's tolerance.
    """
    if worst := goldens.worst_difference(golden.outputs, answer, manifest.tolerances):
        raise GoldenDifference(str(worst))
