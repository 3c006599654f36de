"""PyTriton: the transforms, with Triton's dynamic batching; each batch is one gRPC call to the predictor.

REPOSITORY=models BACK=127.0.0.1:9001 python -m benchmarks.peers.pytriton_transformer HTTP_PORT GRPC_PORT METRICS_PORT
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import Tensor
from pytriton.triton import Triton, TritonConfig
from tritonclient.grpc import InferenceServerClient, InferInput

from benchmarks.peers import halves
from benchmarks.peers.pytriton_predictor import CONFIG, MODEL


def main() -> None:
    http, grpc, metrics = map(int, sys.argv[1:])
    transformer = halves.transformer(os.environ["REPOSITORY"], MODEL)
    clients: list[InferenceServerClient] = []

    @batch
    def infer(features: Any) -> dict[str, Any]:
        if not clients:  # made where it is used: this may be another process than the one that binds
            clients.append(InferenceServerClient(os.environ["BACK"]))
        array = halves.features(transformer, features)
        tensor = InferInput("features", list(array.shape), "FP32")
        tensor.set_data_from_numpy(array)
        return {"probabilities": clients[0].infer(MODEL, [tensor]).as_numpy("probabilities")}

    with Triton(config=TritonConfig(http_port=http, grpc_port=grpc, metrics_port=metrics)) as triton:
        triton.bind(
            model_name=MODEL,
            infer_func=infer,
            inputs=[Tensor(name="features", dtype=np.float64, shape=(30,))],
            outputs=[Tensor(name="probabilities", dtype=np.float32, shape=(2,))],
            config=CONFIG,
        )
        triton.serve()


if __name__ == "__main__":
    main()
