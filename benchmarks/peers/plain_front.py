"""The split as it is written first: FastAPI and the transforms in front, one gRPC call for each request. uvloop, two workers.

REPOSITORY=models BACK=127.0.0.1:9001 python -m uvicorn benchmarks.peers.plain_front:app --workers 2
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
import orjson
from fastapi import FastAPI, Request, Response

from benchmarks.peers import halves
from splitserve.api.inference import inference_pb2 as pb

METHOD = "/inference.GRPCInferenceService/ModelInfer"
DTYPES: dict[str, Any] = {"FP32": "<f4", "INT64": "<i8"}
TRANSFORMERS = {model: halves.transformer(os.environ["REPOSITORY"], model) for model in halves.MODELS}


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with grpc.aio.insecure_channel(os.environ["BACK"]) as channel:
        app.state.infer = channel.unary_unary(
            METHOD,
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelInferResponse.FromString,
        )
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/v2/models/{model}/infer")
async def infer(model: str, request: Request) -> Response:
    inputs = orjson.loads(await request.body())["inputs"]
    array = halves.features(TRANSFORMERS[model], halves.rows(inputs))
    tensor = pb.ModelInferRequest.InferInputTensor(name="features", datatype="FP32", shape=array.shape)
    message = pb.ModelInferRequest(model_name=model, inputs=[tensor], raw_input_contents=[array.tobytes()])
    answer = await app.state.infer(message, timeout=10)
    outputs = zip(answer.outputs, answer.raw_output_contents, strict=True)
    content = halves.answer(model, {each.name: _array(each, raw) for each, raw in outputs})
    return Response(
        orjson.dumps(content, default=lambda array: array.tolist(), option=orjson.OPT_SERIALIZE_NUMPY),
        media_type="application/json",
    )


def _array(tensor: pb.ModelInferResponse.InferOutputTensor, raw: bytes) -> Any:
    if tensor.datatype == "BYTES":
        return np.array(raw.decode().split("\0"), dtype=np.object_)
    return np.frombuffer(raw, dtype=DTYPES[tensor.datatype]).reshape(tensor.shape)
