"""Program: call one system with a third-party client and with ours, in one process, whichever was imported first.

``python beside.py triton|kserve ours|theirs GRPC_ADDRESS HTTP_ADDRESS`` prints the label that each call got.
"""

from __future__ import annotations

import asyncio
import sys

import numpy as np

FEATURES = np.ones((2, 30), np.float32)


def ours(grpc: str, http: str) -> list[str]:
    from splitserve import AsyncClient, Client

    labels = []
    for url in (grpc, f"http://{http}"):
        with Client(url) as client:
            labels.append(str(client.infer("breast-cancer", FEATURES)["label"].tolist()))

    async def asynchronous() -> None:
        async with AsyncClient(grpc) as client:
            labels.append(str((await client.infer("breast-cancer", FEATURES))["label"].tolist()))

    asyncio.run(asynchronous())
    return labels


def triton(grpc: str, http: str) -> list[str]:
    import tritonclient.grpc
    import tritonclient.http

    labels = []
    for module, address in ((tritonclient.grpc, grpc), (tritonclient.http, http)):
        tensor = module.InferInput("features", list(FEATURES.shape), "FP32")
        tensor.set_data_from_numpy(FEATURES)
        with module.InferenceServerClient(address) as client:
            labels.append(str(client.infer("breast-cancer", [tensor]).as_numpy("label").tolist()))
    return labels


def kserve(grpc: str, http: str) -> list[str]:
    from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig

    tensor = InferInput("features", list(FEATURES.shape), "FP32")
    tensor.set_data_from_numpy(FEATURES, binary_data=True)

    async def call() -> list[str]:
        over_grpc = await InferenceGRPCClient(grpc).infer(InferRequest("breast-cancer", [tensor]))
        rest = InferenceRESTClient(RESTConfig(protocol="v2"))
        over_rest = await rest.infer(f"http://{http}", InferRequest("breast-cancer", [tensor]), model_name="breast-cancer")
        return [str(answer.outputs[0].as_numpy().tolist()) for answer in (over_grpc, over_rest)]

    return asyncio.run(call())


if __name__ == "__main__":
    other, first, *addresses = sys.argv[1:]
    theirs = {"triton": triton, "kserve": kserve}[other]
    for call in (ours, theirs, ours) if first == "ours" else (theirs, ours, theirs):
        print(*call(*addresses))
