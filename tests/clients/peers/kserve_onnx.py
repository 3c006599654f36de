"""KServe's model server with one ONNX model. Arguments: its name, its file, its signature as JSON, then those of KServe."""

import json
import sys

import kserve
import onnxruntime
from kserve import InferOutput, InferRequest, InferResponse

name, file, signature = sys.argv[1:4]
DATATYPES = {"float32": "FP32", "int64": "INT64"}


class OnnxModel(kserve.Model):
    def __init__(self) -> None:
        super().__init__(name)
        self._session = onnxruntime.InferenceSession(file)
        self._signature = json.loads(signature)
        self.ready = True

    def get_input_types(self) -> list[dict]:
        return self._signature["inputs"]

    def get_output_types(self) -> list[dict]:
        return self._signature["outputs"]

    async def predict(self, payload: InferRequest, headers: object = None, response_headers: object = None) -> InferResponse:
        names = [output.name for output in self._session.get_outputs()]
        feeds = {tensor.name: tensor.as_numpy() for tensor in payload.inputs}
        outputs = []
        for output, array in zip(names, self._session.run(names, feeds), strict=True):
            outputs.append(InferOutput(output, list(array.shape), DATATYPES[str(array.dtype)]))
            outputs[-1].set_data_from_numpy(array)
        return InferResponse(payload.id, self.name, outputs)


if __name__ == "__main__":
    kserve.ModelServer(workers=1, access_log_format=None).start([OnnxModel()])
