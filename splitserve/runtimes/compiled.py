"""The compiled form of transforms: an ONNX model that `publish` has proven equal to them.

The only module on the preprocess side that needs ONNX Runtime, which is optional there: imported only to load a compiled form.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from splitserve.arrays import Array, from_array, to_array
from splitserve.errors import InvalidInput
from splitserve.repository.manifest import Manifest
from splitserve.runtimes.predictor import Predictor
from splitserve.signature import TensorSpec
from splitserve.tensors import Tensor


class CompiledTransforms:
    """Request tensors -> features, by ONNX Runtime. Text is passed as on the wire, where "" is a missing value.

    Args:
        model: the ONNX file's bytes.
        manifest: of the bundle.

    Raises:
        BundleError: ONNX Runtime cannot run the model, or its inputs are others.
    """

    def __init__(self, model: bytes, manifest: Manifest) -> None:
        self._model = Predictor(model)
        self._specs = manifest.inputs
        self._accepted = {spec.name: spec for spec in self._model.inputs}

    def __call__(self, tensors: Sequence[Tensor]) -> Array:
        """Args:
            tensors: in the signature's order, checked against it.

        Raises:
            InvalidInput: text is not UTF-8, or a number is infinite, which scikit-learn rejects.
        """
        given = [
            _as_declared(self._accepted[spec.name], spec, tensor)
            for spec, tensor in zip(self._specs, tensors, strict=True)
            if spec.name in self._accepted
        ]
        return to_array(self._model.infer(given)[0])


def _as_declared(takes: TensorSpec, spec: TensorSpec, tensor: Tensor) -> Tensor:
    shape = (tensor.n_rows, *spec.wire_shape[1:])
    if tensor.datatype == "BYTES":
        return Tensor(tensor.name, "BYTES", shape, tensor.raw)
    array = to_array(tensor)
    if array.dtype.kind == "f" and not np.isfinite(array).all() and np.isinf(array).any():
        raise InvalidInput(f'input "{tensor.name}": infinite values are not supported')
    return from_array(
        tensor.name, array.reshape(shape).astype(np.float32 if takes.datatype == "FP32" else np.float64), takes.datatype
    )
