"""The back end of `plain_front`: grpcio with uvloop and an ONNX session.

REPOSITORY=models python -m benchmarks.peers.plain_back 9001
"""

from __future__ import annotations

import os
import sys
from typing import Any

import grpc
import uvloop

from benchmarks.peers import halves
from splitserve.api.inference import inference_pb2 as pb

DATATYPES = {"float32": "FP32", "int64": "INT64", "object": "BYTES"}
SESSIONS = {model: halves.session(os.environ["REPOSITORY"], model) for model in halves.MODELS}


async def infer(request: pb.ModelInferRequest, context: Any) -> pb.ModelInferResponse:
    import numpy as np

    array = np.frombuffer(request.raw_input_contents[0], "<f4").reshape(request.inputs[0].shape)
    answer = pb.ModelInferResponse(model_name=request.model_name)
    for name, output in halves.run(SESSIONS[request.model_name], array).items():
        answer.outputs.add(name=name, datatype=DATATYPES[str(output.dtype)], shape=output.shape)
        raw = output.tobytes() if output.dtype != object else "\0".join(output.tolist()).encode()
        answer.raw_output_contents.append(raw)
    return answer


async def serve(port: str) -> None:
    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(
        infer,
        request_deserializer=pb.ModelInferRequest.FromString,
        response_serializer=pb.ModelInferResponse.SerializeToString,
    )
    service = grpc.method_handlers_generic_handler("inference.GRPCInferenceService", {"ModelInfer": handler})
    server.add_generic_rpc_handlers((service,))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1]))
