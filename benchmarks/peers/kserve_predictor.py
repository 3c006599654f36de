"""KServe's SDK: the predictor.

REPOSITORY=models python -m benchmarks.peers.kserve_predictor --http_port 9000 --grpc_port 9001
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import kserve
from kserve import InferOutput, InferRequest, InferResponse

from benchmarks.peers import halves

DATATYPES = {"float32": "FP32", "int64": "INT64", "object": "BYTES"}


class KServePredictor(kserve.Model):  # type: ignore[misc]
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._session = halves.session(os.environ["REPOSITORY"], name)
        self.ready = True

    async def predict(self, payload: InferRequest, headers: Any = None, response_headers: Any = None) -> InferResponse:
        found = halves.run(self._session, payload.inputs[0].as_numpy())
        outputs = []
        for name, array in found.items():
            output = InferOutput(name, list(array.shape), DATATYPES[str(array.dtype)])
            output.set_data_from_numpy(array)
            outputs.append(output)
        return InferResponse(payload.id, self.name, outputs)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(parents=[kserve.model_server.parser]).parse_args()
    kserve.ModelServer(workers=1, access_log_format=None).start([KServePredictor(model) for model in halves.MODELS])
