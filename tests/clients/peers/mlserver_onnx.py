"""A runtime of MLServer that runs an ONNX model; its file is in ``parameters.uri`` of the model's settings."""

import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class OnnxModel(MLModel):
    async def load(self) -> bool:
        self._session = onnxruntime.InferenceSession(self.settings.parameters.uri)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        feeds = {tensor.name: NumpyCodec.decode_input(tensor) for tensor in payload.inputs}
        names = [output.name for output in self._session.get_outputs()]
        outputs = []
        for name, array in zip(names, self._session.run(names, feeds), strict=True):
            outputs.append(NumpyCodec.encode_output(name, array))
            outputs[-1].shape = list(array.shape)  # the codec makes (n, 1) of (n,)
        return InferenceResponse(id=payload.id, model_name=self.name, outputs=outputs)
