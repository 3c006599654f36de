"""KServe's SDK: the transformer, which calls the predictor over gRPC.

REPOSITORY=models python -m benchmarks.peers.kserve_transformer --http_port 9002 --grpc_port 9003 \
    --predictor_host 127.0.0.1:9001 --predictor_protocol grpc-v2
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import kserve
import numpy as np
import pandas as pd
from kserve import InferInput, InferRequest, InferResponse

from benchmarks.peers import halves


class KServeTransformer(kserve.Model):  # type: ignore[misc]
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._transformer = halves.transformer(os.environ["REPOSITORY"], name)
        self.ready = True

    async def preprocess(self, payload: InferRequest, headers: Any = None) -> InferRequest:
        array = halves.features(self._transformer, _rows(payload))
        features = InferInput("features", list(array.shape), "FP32")
        features.set_data_from_numpy(array)
        return InferRequest(self.name, [features])

    async def postprocess(self, result: InferResponse, headers: Any = None, response_headers: Any = None) -> InferResponse:
        for output in result.outputs:  # as JSON over REST
            output.set_data_from_numpy(output.as_numpy(), binary_data=False)
        return result


def _rows(payload: InferRequest) -> Any:
    arrays = {each.name: each.as_numpy() for each in payload.inputs}
    if len(arrays) == 1:
        return next(iter(arrays.values()))
    return pd.DataFrame({name: _column(array.reshape(-1)) for name, array in arrays.items()})


def _column(array: Any) -> Any:
    if array.dtype.kind not in "OS":
        return array
    return np.array([value.decode() if isinstance(value, bytes) else value for value in array], dtype=object)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(parents=[kserve.model_server.parser]).parse_args()
    kserve.ModelServer(workers=1, access_log_format=None).start([KServeTransformer(model) for model in halves.MODELS])
