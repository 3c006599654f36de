"""Everything in one process, written with care: FastAPI without pydantic models, orjson, uvloop, httptools, two workers.

REPOSITORY=models python -m uvicorn benchmarks.peers.single:app --workers 2
"""

from __future__ import annotations

import os

import orjson
from fastapi import FastAPI, Request, Response

from benchmarks.peers import halves

REPOSITORY = os.environ["REPOSITORY"]
TRANSFORMERS = {model: halves.transformer(REPOSITORY, model) for model in halves.MODELS}
SESSIONS = {model: halves.session(REPOSITORY, model) for model in halves.MODELS}

app = FastAPI()


@app.post("/v2/models/{model}/infer")
async def infer(model: str, request: Request) -> Response:
    """Transform and predict in the event loop: switching threads costs more than either."""
    inputs = orjson.loads(await request.body())["inputs"]
    outputs = halves.run(SESSIONS[model], halves.features(TRANSFORMERS[model], halves.rows(inputs)))
    return Response(_encode(halves.answer(model, outputs)), media_type="application/json")


def _encode(content: object) -> bytes:
    # orjson does not serialise labels, which are object arrays.
    return orjson.dumps(content, default=lambda array: array.tolist(), option=orjson.OPT_SERIALIZE_NUMPY)
