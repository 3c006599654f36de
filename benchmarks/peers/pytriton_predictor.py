"""PyTriton: the predictor, with Triton's dynamic batching.

REPOSITORY=models python -m benchmarks.peers.pytriton_predictor HTTP_PORT GRPC_PORT METRICS_PORT
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

from benchmarks.peers import halves

MODEL = "breast-cancer"
CONFIG = ModelConfig(max_batch_size=256, batcher=DynamicBatcher(max_queue_delay_microseconds=0))


def main() -> None:
    http, grpc, metrics = map(int, sys.argv[1:])
    session = halves.session(os.environ["REPOSITORY"], MODEL)

    @batch
    def infer(features: Any) -> dict[str, Any]:
        return {"probabilities": halves.run(session, features)["probabilities"]}

    with Triton(config=TritonConfig(http_port=http, grpc_port=grpc, metrics_port=metrics)) as triton:
        triton.bind(
            model_name=MODEL,
            infer_func=infer,
            inputs=[Tensor(name="features", dtype=np.float32, shape=(30,))],
            outputs=[Tensor(name="probabilities", dtype=np.float32, shape=(2,))],
            config=CONFIG,
        )
        triton.serve()


if __name__ == "__main__":
    main()
