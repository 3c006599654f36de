"""A loaded preprocessor: request tensors -> the predictor's inputs, and the predictor's outputs -> the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np

from splitserve.arrays import DTYPES, Array, from_array, to_array
from splitserve.errors import InvalidInput
from splitserve.repository import environment, pairing
from splitserve.repository import golden as goldens
from splitserve.repository.bundle import Bundle
from splitserve.repository.golden import Golden
from splitserve.repository.manifest import COMPILED_FILE, GOLDEN_FILE, PLAN_ARRAYS_FILE, PLAN_FILE, BundleError, Manifest
from splitserve.runtimes import postprocess
from splitserve.runtimes.meaning import meaning_of
from splitserve.runtimes.plans import files as plan_files
from splitserve.runtimes.plans.files import Plan
from splitserve.runtimes.plans.layouts import RefusedValue
from splitserve.runtimes.rows import Rowset, to_rows
from splitserve.signature import InputCheck, OutputBytes, TensorSpec, bound_sizes, check_outputs, empty
from splitserve.tensors import Tensor

if TYPE_CHECKING:
    from types import ModuleType

RuntimeChoice = Literal["auto", "sklearn", "onnx"]

_MESSAGE_LENGTH = 300


class Preprocessor:
    """Fitted transforms and their manifest. Knows no transport.

    Args:
        manifest: of the bundle.
        transformer: fitted; None if there is only a compiled form.
        compiled: request tensors in the signature's order -> features.
        plan: likewise, by numpy alone.
    """

    def __init__(
        self,
        manifest: Manifest,
        transformer: Any,
        compiled: Callable[[Sequence[Tensor]], Array] | None = None,
        plan: Plan | None = None,
    ) -> None:
        if manifest.rows is None:
            raise BundleError('manifest.json: a preprocessor needs "rows"')
        self.manifest = manifest
        self.manifest_sha256 = ""
        """The digest of the bundle's manifest, by which a release names it."""
        self.warnings: tuple[str, ...] = ()
        """Differences from the publisher's environment that were allowed."""
        self._rows = manifest.rows
        self.transformer = transformer
        """Called for rows that a plan or the compiled form rejects, to decide and say why; None if there is only a compiled form
        or the bundle's own plan, or there are no transforms."""
        self._postprocess = manifest.postprocess
        self._labels = manifest.labels
        self._refuses = manifest.refuses
        self.inputs = manifest.inputs
        self.outputs = manifest.outputs
        self.ignored = frozenset(manifest.ignored)
        """Names of inputs that clients may send and that are not looked at."""
        self.check = InputCheck(self.inputs, widen=True, with_contents=False)
        """Raises `InvalidInput` for tensors that do not fit the signature, and gives them in its order."""
        self.output_bytes = OutputBytes(self.inputs, self.outputs)
        """How large the features will be."""
        self._plan = plan
        self._compiled = compiled

    def transform(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Request tensors (n_rows, …) -> the predictor's inputs (n_rows, …).

        Raises:
            InvalidInput: a tensor does not fit the signature, or the transforms reject a value.
            PairMismatch: the features do not have the manifest's signature.
        """
        tensors = self.check(inputs)
        if self.passes_on:
            self.check.fully(inputs)
            return _passed_on(self.outputs, inputs)
        n_rows = tensors[0].n_rows
        if n_rows == 0:
            sizes = bound_sizes(self.inputs, inputs)
            return tuple(empty(spec, sizes) for spec in self.outputs)
        try:
            features = self._features(tensors)
        except InvalidInput:
            self.check.fully(inputs)  # which names what is wrong with the bytes, if they are what is refused
            raise
        return (self._output(features, n_rows),)

    def _features(self, tensors: Sequence[Tensor]) -> Array:
        """The features of tensors in the signature's order."""
        if self._compiled is not None:
            try:
                return self._compiled(tensors)
            except InvalidInput:
                if self.transformer is None:
                    raise
        if self._plan is not None:
            try:
                return self._plan(tensors)
            except RefusedValue as error:
                if self.transformer is None:
                    raise InvalidInput(f"the transforms refuse a row: {_first_line(error)}") from None
        rows = to_rows(self._rows, self.inputs, tensors)
        try:
            with np.errstate(all="ignore"):  # a caller's values must not cause warnings in the log
                return to_dense(_scikit_learn().transform(self.transformer, rows))
        except ValueError as error:
            raise InvalidInput(f"the transforms refuse a row: {_first_line(error)}") from error

    def _output(self, features: Array, n_rows: int) -> Tensor:
        spec = self.outputs[0]
        if n_rows == 1 and features.shape == spec.shape[1:]:  # scikit-learn's SparsePCA loses the dimension of rows
            features = features[np.newaxis]
        with np.errstate(over="ignore"):  # values beyond float32 become infinite; `check_values` decides
            converted = _converted(features, DTYPES[spec.datatype])
        try:
            self.check_values(converted)
        except InvalidInput:
            _check_range(features, converted, spec.datatype)  # which knows better what is wrong
            raise
        output = from_array(spec.name, converted, spec.datatype)
        if output.shape != (n_rows, *spec.shape[1:]):
            check_outputs(self.outputs, (output,), n_rows)
        return output

    @property
    def passes_on(self) -> bool:
        """Whether the inputs are passed to the predictor unchanged."""
        return self._rows.form == "tensors"

    @property
    def runtime(self) -> str:
        """The runtime of the transforms: "sklearn", "plan" or "onnx"."""
        if self._compiled is not None:
            return "onnx"
        return "sklearn" if self._plan is None else "plan"

    def adopt_plan(self, golden: Golden) -> None:
        """Use a plan from now on, if there is one that equals the transforms on golden samples."""
        if self._rows.form == "tensors":
            return
        from splitserve.runtimes.plans.planner import NotPlanned, make_plan

        try:
            plan = make_plan(self.transformer, self._rows, self.inputs, keep_originals=True).plan
        except NotPlanned:
            return
        if _agree(plan, self.transformer, to_rows(self._rows, self.inputs, golden.inputs), golden.inputs):
            self._plan = plan

    def check_values(self, features: Array) -> None:
        """Refuse features that the manifest says the model does not accept.

        Raises:
            InvalidInput: names the row.
        """
        if self._refuses and features.dtype.kind == "f":
            bad = np.isinf(features) if self._refuses == "inf" else ~np.isfinite(features)
            if bad.any():
                row = int(np.argmax(bad.reshape(len(bad), -1).any(axis=1)))
                what = "an infinite value" if self._refuses == "inf" else "a missing or infinite value"
                raise InvalidInput(f"row {row}: the features contain {what}, which the model does not accept")

    def differences(self, predictor_inputs: Sequence[TensorSpec], predictor_outputs: Sequence[TensorSpec]) -> list[str]:
        """Why this cannot be paired with a predictor of this signature; empty if it can."""
        return pairing.misfits(self.manifest, predictor_inputs, predictor_outputs)

    def sent(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The outputs of `transform` under the predictor's input names."""
        return pairing.sent(self.manifest, outputs)

    def answer_specs(self, predictor_outputs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        """The signature of `answer` for a predictor with these outputs."""
        if self._postprocess is None:
            return tuple(predictor_outputs)
        return postprocess.output_specs(self._postprocess, predictor_outputs)

    def answer(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A predictor's outputs -> what the client gets."""
        if self._postprocess is None:
            return outputs
        return postprocess.apply(self._postprocess, self._labels, outputs)


def load(
    bundle: Bundle,
    *,
    trusted_modules: Sequence[str] = (),
    allow_environment_mismatch: bool = False,
    allow_unsafe_pickle: bool = False,
    runtime: RuntimeChoice = "auto",
) -> Preprocessor:
    """Load a preprocessor's bundle, check it against its manifest and replay its golden samples.

    Args:
        bundle: with its files fetched.
        trusted_modules: as for `sklearn_pipeline.load`.
        allow_environment_mismatch: rely on the golden samples if library versions differ.
        allow_unsafe_pickle: as for `sklearn_pipeline.read`.
        runtime: "onnx" uses the compiled form, "sklearn" loads the transforms, "auto" prefers the bundle's own plan, then a plan
            that is made of the transforms, then the compiled form if ONNX Runtime is installed.

    Raises:
        BundleError: a file is damaged, the environment does not match, a type or a pickle is not allowed, the compiled form is
            required and missing, or outputs differ from the golden samples.
    """
    preprocessor = _load(bundle, trusted_modules, allow_environment_mismatch, allow_unsafe_pickle, runtime)
    preprocessor.manifest_sha256 = bundle.manifest_sha256
    return preprocessor


def _load(
    bundle: Bundle,
    trusted_modules: Sequence[str],
    allow_environment_mismatch: bool,
    allow_unsafe_pickle: bool,
    runtime: RuntimeChoice,
) -> Preprocessor:
    manifest = bundle.manifest
    warnings: tuple[str, ...] = ()
    transformer = None
    has_transforms = manifest.rows is None or manifest.rows.form != "tensors"
    if has_transforms and bool(manifest.portable) != (PLAN_FILE in manifest.files):
        raise BundleError(f'manifest.json: expected "portable": true if and only if there is {PLAN_FILE}')
    if has_transforms and manifest.portable and runtime == "auto":
        preprocessor, problem = _load_portable(bundle, allow_environment_mismatch)
        if preprocessor is not None:
            return preprocessor
        warnings = (f"the plan is not used: {problem}",)
    if has_transforms:
        scikit_learn = _scikit_learn(manifest, warnings)
        warnings += _check_environment(manifest, allow_environment_mismatch)
        for name in manifest.files:  # also the form of the transforms that does not run here: a release is of all files
            bundle.read(name)
        if runtime == "onnx":
            preprocessor = _load_compiled(bundle)
            preprocessor.warnings = warnings
            return preprocessor
        transformer = scikit_learn.read(bundle, trusted_modules, allow_unsafe_pickle=allow_unsafe_pickle)
        _check_meaning(manifest, transformer)
    preprocessor = Preprocessor(manifest, transformer)
    preprocessor.warnings = warnings
    if transformer is not None and _scikit_learn().is_pickle(bundle):
        preprocessor.warnings += ("the transforms are a pickle, which can run any code, allowed by a setting",)
    golden = bundle.read(GOLDEN_FILE)
    goldens.replay(golden, manifest, preprocessor.transform)
    preprocessor.adopt_plan(goldens.decode(golden, manifest.inputs, manifest.outputs))
    if runtime == "auto" and preprocessor.runtime == "sklearn" and _is_compiled(manifest) and find_spec("onnxruntime"):
        try:
            compiled = _load_compiled(bundle)
        except BundleError as error:
            preprocessor.warnings += (f"the compiled form is not used: {error}",)
        else:
            compiled.transformer, compiled.warnings = transformer, preprocessor.warnings
            return compiled
    if preprocessor.runtime == "plan":  # the samples were replayed without it
        goldens.replay(golden, manifest, preprocessor.transform)
    return preprocessor


def _scikit_learn(manifest: Manifest | None = None, warnings: Sequence[str] = ()) -> ModuleType:
    """The module that loads and calls transforms, imported for the first bundle that needs it.

    Args:
        manifest: of the bundle, for the message.
        warnings: why its plan does not run here, if it has one.

    Raises:
        BundleError: scikit-learn and skops are not installed.
    """
    try:
        from splitserve.runtimes import sklearn_pipeline
    except ImportError as error:
        raise BundleError(
            f"{_not_portable(manifest, warnings)}; its transforms need scikit-learn and skops, which are not installed here "
            f"({_first_line(error)}): serve it where they are, as in the image preprocess"
        ) from None
    return sklearn_pipeline


def _not_portable(manifest: Manifest | None, warnings: Sequence[str]) -> str:
    if warnings:
        return "; ".join(warnings)
    if manifest is None or manifest.portable is None:
        return "the bundle was published without a plan"
    return (
        f"the bundle is not portable: {manifest.not_portable}"
        if not manifest.portable
        else "PREPROCESS_RUNTIME loads its transforms"
    )


def _load_portable(bundle: Bundle, allow_mismatch: bool) -> tuple[Preprocessor | None, str]:
    """A preprocessor that runs by the bundle's own plan; None if versions here do not fit, and which.

    Raises:
        BundleError: as `load`.
    """
    manifest = bundle.manifest
    for name in manifest.files:  # also the transforms, which are not loaded: a release is of all files
        bundle.read(name)
    plan = bundle.read(PLAN_FILE)
    problems = [str(each) for each in environment.mismatches("preprocess", manifest.environment, portable=True)]
    problems += plan_files.missing_requirements(plan)
    if problems and not allow_mismatch:
        return None, "; ".join(problems)
    if manifest.rows is None or len(manifest.outputs) != 1:
        raise BundleError(f'manifest.json: with {PLAN_FILE}, expected "rows" and one output')
    arrays = bundle.read(PLAN_ARRAYS_FILE)
    run = plan_files.decode(plan, arrays, manifest.rows, manifest.inputs, manifest.outputs[0], manifest.fingerprint)
    preprocessor = Preprocessor(manifest, None, plan=run)
    preprocessor.warnings = tuple(f"{each}, allowed: relying on the golden samples" for each in problems)
    goldens.replay(bundle.read(GOLDEN_FILE), manifest, preprocessor.transform)
    return preprocessor, ""


def _is_compiled(manifest: Manifest) -> bool:
    return manifest.compiled is not None and manifest.compiled.is_equal


def _load_compiled(bundle: Bundle) -> Preprocessor:
    """Raises:
    BundleError: there is no compiled form, it cannot be run here, or its outputs differ from the golden samples.
    """
    manifest = bundle.manifest
    if not _is_compiled(manifest):
        reason = manifest.compiled.reason if manifest.compiled else "it was published without looking for one"
        raise BundleError(f"no compiled form: {reason}; serve it with PREPROCESS_RUNTIME=auto")
    try:
        from splitserve.runtimes.compiled import CompiledTransforms  # ONNX Runtime is an optional part of preprocess
    except ImportError as error:
        raise BundleError(f'{COMPILED_FILE}: {error}; install "splitserve[compiled]"') from None
    preprocessor = Preprocessor(manifest, None, CompiledTransforms(bundle.read(COMPILED_FILE), manifest))
    goldens.replay(bundle.read(GOLDEN_FILE), manifest, preprocessor.transform)
    return preprocessor


def _check_environment(manifest: Manifest, allow_mismatch: bool) -> tuple[str, ...]:
    """Warnings about differences of this environment that are allowed.

    Raises:
        BundleError: a difference is not allowed.
    """
    found = environment.mismatches("preprocess", manifest.environment)
    refused = [str(each) for each in found if each.is_required]
    if refused and not allow_mismatch:
        raise BundleError(
            f"{'; '.join(refused)}; serve it where the versions match, publish it again with those here, or set "
            "PREPROCESS_ALLOW_ENVIRONMENT_MISMATCH=true and rely on the golden samples"
        )
    return tuple(f"{each}, allowed: relying on the golden samples" if each.is_required else str(each) for each in found)


def _check_meaning(manifest: Manifest, transformer: Any) -> None:
    """Raises:
    BundleError: the transforms' columns or vocabularies differ from the manifest's fingerprint.
    """
    found = meaning_of(transformer).fingerprint
    if manifest.fingerprint and found != manifest.fingerprint:
        raise BundleError(f"fingerprint of the features: expected {manifest.fingerprint} as in manifest.json, got {found}")


def _passed_on(specs: Sequence[TensorSpec], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tensors in the signature's order, widened and reshaped to it."""
    by_name = {tensor.name: tensor for tensor in inputs}
    return tuple(_fitted(spec, by_name[spec.name]) for spec in specs)


def _fitted(spec: TensorSpec, tensor: Tensor) -> Tensor:
    if len(tensor.shape) != len(spec.shape):
        tensor = msgspec.structs.replace(tensor, shape=(*tensor.shape, 1))
    if tensor.datatype == spec.datatype:
        return tensor
    return from_array(spec.name, to_array(tensor).astype(DTYPES[spec.datatype]), spec.datatype)


def to_dense(features: Any) -> Array:
    """A transform's result as a plain array, from a sparse matrix or a DataFrame, too."""
    if hasattr(features, "toarray"):
        features = features.toarray()
    array = np.asarray(features)
    if array.dtype.kind == "O" and hasattr(features, "dtypes") and all(dtype.kind in "biuf" for dtype in features.dtypes):
        array = features.to_numpy(np.float64, na_value=np.nan)  # pandas.NA, of its nullable dtypes, is no number
    return array


def _converted(features: Array, dtype: Any) -> Array:
    try:
        return features.astype(dtype, copy=False)
    except (TypeError, ValueError) as error:  # of objects that are not numbers
        raise InvalidInput(f"the transforms give something other than numbers: {_first_line(error)}") from error


def _agree(plan: Plan, transformer: Any, rows: Rowset, tensors: Sequence[Tensor]) -> bool:
    """Whether both give the same bits."""
    try:
        expected, found = to_dense(transformer.transform(rows)), plan(tensors)
    except Exception:  # the original raises it again, when the samples are replayed
        return False
    return (found.dtype, found.shape, found.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())


def _check_range(features: Array, converted: Array, datatype: str) -> None:
    """Raises:
    InvalidInput: a feature was finite before it was converted.
    """
    if features.dtype.kind != "f":
        return
    bad = np.isfinite(features) & np.isinf(converted)
    if bad.any():
        row, value = int(np.argmax(bad.reshape(len(bad), -1).any(axis=1))), features[bad][0]
        raise InvalidInput(f"row {row}: a feature is {value:.3g}, beyond the range of {datatype}, with which the model computes")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:_MESSAGE_LENGTH]
