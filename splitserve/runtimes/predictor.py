"""A loaded predictor: tensors -> tensors, by ONNX Runtime."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

# Official builds of ONNX Runtime send telemetry unless this is set before they are loaded; see docs/decisions/0007.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort

from splitserve.arrays import Array, from_array, objects, to_array
from splitserve.errors import InvalidInput
from splitserve.oip.messages import MANIFEST_SHA256
from splitserve.oip.statistics import Stopwatch
from splitserve.repository import golden as goldens
from splitserve.repository import pairing
from splitserve.repository.bundle import Bundle
from splitserve.repository.manifest import GOLDEN_FILE, MODEL_FILE, BundleError, Manifest
from splitserve.runtimes import onnx_support
from splitserve.runtimes.external_data import refuse_external_data
from splitserve.signature import (
    BATCH,
    Dimension,
    InputCheck,
    OutputBytes,
    TensorSpec,
    bound_sizes,
    choose_outputs,
    empty,
    is_row_wise,
)
from splitserve.tensors import DATATYPES, Tensor, decode_bytes

_DATATYPES = {
    "tensor(bool)": "BOOL",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}
"""Source: ONNX Runtime Python API, ``NodeArg.type``."""

_N_DIGITS_MAX = 10

_MAX_PROBE_ELEMENTS = 1024 * 1024
"""Of a row that is generated to learn the shape of the outputs. A request without rows may claim any width at no cost."""

_ONLY_WHAT_WAS_CHECKED = {
    "session.load_model_format": "ONNX",  # not the ORT format, whose contents are not checked here
    "session.model_external_initializers_file_folder_path": os.devnull,  # below which no file exists
}
"""Session options: a model is the bytes whose digest was checked, and no other file.

Source: onnxruntime_session_options_config_keys.h
"""


class RunCanceller:
    """Cancels a run whose caller is gone, even an endless loop: its thread is free again after an operator or two."""

    __slots__ = ("options",)

    def __init__(self) -> None:
        self.options = ort.RunOptions()

    def cancel(self) -> None:
        """May be called from any thread."""
        self.options.terminate = True


class Predictor:
    """An ONNX Runtime session and its signature. Knows no transport; safe to call from several threads.

    Args:
        model: the ONNX file's bytes.
        intra_op_num_threads: threads that one run may use.
        providers: ONNX Runtime's execution providers in order of preference.

    Raises:
        BundleError: ONNX Runtime cannot run the model, or an input or output is not a tensor.
    """

    def __init__(
        self, model: bytes, *, intra_op_num_threads: int = 1, providers: Sequence[str] = ("CPUExecutionProvider",)
    ) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = intra_op_num_threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # errors are raised as exceptions, which are logged
        for entry, value in _ONLY_WHAT_WAS_CHECKED.items():
            options.add_session_config_entry(entry, value)
        refuse_external_data(model)
        try:
            self._session = ort.InferenceSession(model, options, providers=list(providers))
        except Exception as error:
            raise BundleError(f"{MODEL_FILE}: ONNX Runtime {ort.__version__} cannot load it: {error}") from None
        self.manifest_sha256 = ""
        """The digest of the bundle's manifest, by which a release names it."""
        self.properties: dict[str, str] = {}
        """Facts about the version, for its metadata."""
        self.inputs = tuple(_spec(node) for node in self._session.get_inputs())
        self.outputs = tuple(_spec(node) for node in self._session.get_outputs())
        self.check = InputCheck(self.inputs, widen=False)
        """Returns tensors in the signature's order; raises `InvalidInput` if they do not fit it."""
        self.is_row_wise = is_row_wise(self.inputs, self.outputs)
        self.output_bytes = OutputBytes(self.inputs, self.outputs)
        """How large an answer will be."""
        self._has_rows = all(spec.shape and not isinstance(spec.shape[0], int) for spec in self.outputs)
        self._specs = {spec.name: spec for spec in self.outputs}
        self._names = list(self._specs)

    def infer(
        self,
        inputs: Sequence[Tensor],
        wanted: Sequence[str] = (),
        watch: Stopwatch | None = None,
        canceller: RunCanceller | None = None,
    ) -> tuple[Tensor, ...]:
        """Run the model.

        Args:
            inputs: as the signature has them, in any order.
            wanted: names of the outputs to compute, in this order; all if empty.
            watch: records the duration of each part.
            canceller: ends the run from another thread; the error that the run then raises is to be ignored.

        Raises:
            InvalidInput: a tensor does not fit the signature, an output is unknown, or the model rejects the values.
        """
        watch = watch or Stopwatch()
        watch.end("queue")
        self.check(inputs)
        names, specs = choose_outputs(self.outputs, wanted) if wanted else self._names, self._specs
        feeds = {}
        for tensor in inputs:
            if not tensor.n_rows and self._has_rows:  # some operators fail without rows
                return self._no_rows(inputs, [specs[name] for name in names])
            feeds[tensor.name] = _text(tensor) if tensor.datatype == "BYTES" else to_array(tensor)
        watch.end("input")
        try:
            arrays = self._session.run(names, feeds, canceller.options if canceller else None)
        except Exception as error:
            if type(error).__name__ in ("InvalidArgument", "Fail", "RuntimeException"):
                raise InvalidInput("the model refuses the values of these tensors") from error
            raise
        watch.end("infer")
        outputs = tuple([from_array(name, array, specs[name].datatype) for name, array in zip(names, arrays, strict=True)])
        watch.end("output")
        return outputs

    def _no_rows(self, inputs: Sequence[Tensor], specs: Sequence[TensorSpec]) -> tuple[Tensor, ...]:
        """Outputs of shape (0, ...). Sizes that the inputs do not give are those that the model gives a row of zeros."""
        sizes = bound_sizes(self.inputs, inputs)
        if {size for spec in specs for size in spec.shape if isinstance(size, str)} <= sizes.keys():
            return tuple(empty(spec, sizes) for spec in specs)
        unknown = tuple(empty(spec, sizes) for spec in specs)
        if sum(math.prod(tensor.shape[1:]) for tensor in inputs) > _MAX_PROBE_ELEMENTS:
            return unknown
        try:
            outputs = self.infer([_row_of_zeros(tensor) for tensor in inputs], [spec.name for spec in specs])
        except InvalidInput:  # zeros are not valid for every model
            return unknown
        return tuple(Tensor(output.name, output.datatype, (0, *output.shape[1:]), b"") for output in outputs)


def _row_of_zeros(tensor: Tensor) -> Tensor:
    """One row like those of a tensor without rows: zeros, or empty texts. A tensor that has rows is kept."""
    if tensor.n_rows:
        return tensor
    shape = (1, *tensor.shape[1:])
    return Tensor(tensor.name, tensor.datatype, shape, bytes(math.prod(shape) * (DATATYPES[tensor.datatype].itemsize or 4)))


def available_providers() -> list[str]:
    """Execution providers of ONNX Runtime here, in its order of preference."""
    names: list[str] = ort.get_available_providers()
    return names


def load(bundle: Bundle, *, intra_op_num_threads: int = 1, providers: Sequence[str] = ("CPUExecutionProvider",)) -> Predictor:
    """Load a predictor's bundle, check it against its manifest and replay its golden samples.

    Raises:
        BundleError: a file is damaged, ONNX Runtime cannot run the model, its signature is not the manifest's, or its outputs
            differ from its golden samples.
    """
    manifest = bundle.manifest
    _check_environment(manifest)
    predictor = Predictor(bundle.read(MODEL_FILE), intra_op_num_threads=intra_op_num_threads, providers=providers)
    _check_signature("input", manifest.inputs, predictor.inputs)
    _check_signature("output", manifest.outputs, predictor.outputs)
    predictor.manifest_sha256 = bundle.manifest_sha256
    predictor.is_row_wise = predictor.is_row_wise and manifest.is_row_wise
    predictor.properties = {
        "created": manifest.created,
        MANIFEST_SHA256: bundle.manifest_sha256,
        **pairing.meaning_properties(manifest),
    }
    goldens.replay(bundle.read(GOLDEN_FILE), manifest, predictor.infer)
    return predictor


def _check_environment(manifest: Manifest) -> None:
    """Raises:
    BundleError: the installed runtime does not support the ONNX versions in the manifest.
    """
    made_with = manifest.environment
    opsets = {
        "" if name == "opset ai.onnx" else name.removeprefix("opset "): int(version)
        for name, version in made_with.items()
        if name.startswith("opset ") and _is_number(version)
    }
    ir_version = made_with.get("ONNX IR", "")
    if problems := onnx_support.problems(int(ir_version) if _is_number(ir_version) else 1, opsets):
        raise BundleError(
            f"published with {'; '.join(problems)}; serve it with a newer ONNX Runtime, or publish it again "
            "with an older target opset"
        )


def _is_number(text: str) -> bool:
    """Whether this is a version number; the runtime checks others when it loads the model."""
    return text.isdecimal() and len(text) < _N_DIGITS_MAX


def _check_signature(side: str, promised: Sequence[TensorSpec], found: Sequence[TensorSpec]) -> None:
    if {spec.name: spec for spec in promised} != {spec.name: spec for spec in found}:
        raise BundleError(f"{MODEL_FILE}: expected {side}s {_listed(promised)} as in manifest.json, got {_listed(found)}")


def _listed(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f'"{spec.name}" {spec}' for spec in specs) or "none"


def _spec(node: Any) -> TensorSpec:
    datatype = _DATATYPES.get(node.type)
    if datatype is None:
        raise BundleError(f'{MODEL_FILE}: "{node.name}": expected a tensor of one of the protocol\'s datatypes, got {node.type}')
    return TensorSpec(node.name, datatype, tuple(_dimension(node.name, *each) for each in enumerate(node.shape)))


def _dimension(tensor: str, axis: int, size: int | str | None) -> Dimension:
    """A dimension without a name gets a unique one, since equal names mean equal sizes."""
    if isinstance(size, int):
        return size
    return BATCH if axis == 0 else size or f"{tensor}_{axis}"


def _text(tensor: Tensor) -> Array:
    try:
        return objects([element.decode() for element in decode_bytes(tensor)], tensor.shape)
    except UnicodeDecodeError:
        raise InvalidInput(f'input "{tensor.name}": an element is not UTF-8 text') from None
