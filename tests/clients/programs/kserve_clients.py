"""KServe's clients, V2 over REST and gRPC, and V1. Arguments: address of each face."""

import asyncio
import sys

import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig

http, grpc = f"http://{sys.argv[1]}", sys.argv[2]
numbers = np.arange(16, dtype=np.int32).reshape(1, 16)


def request(binary: bool) -> InferRequest:
    inputs = [InferInput(name, [1, 16], "INT32") for name in ("INPUT0", "INPUT1")]
    for each in inputs:
        each.set_data_from_numpy(numbers, binary_data=binary)
    return InferRequest("simple", inputs)


def check(answer: object) -> None:
    outputs = {output.name: output.as_numpy() for output in answer.outputs}
    assert (outputs["OUTPUT0"].reshape(1, 16) == numbers * 2).all()


async def main() -> None:
    rest = InferenceRESTClient(RESTConfig(protocol="v2"))
    assert await rest.is_server_live(http)
    assert await rest.is_server_ready(http)
    assert await rest.is_model_ready(http, "simple")
    assert not await rest.is_model_ready(http, "nope")
    for binary in (False, True):
        check(await rest.infer(http, request(binary), model_name="simple"))
    v1 = InferenceRESTClient(RESTConfig(protocol="v1"))
    assert await v1.is_server_live(http)
    assert await v1.is_model_ready(http, "simple")
    instance = {"INPUT0": numbers[0].tolist(), "INPUT1": numbers[0].tolist()}
    predicted = await v1.infer(http, {"instances": [instance]}, model_name="simple")
    assert predicted["predictions"][0]["OUTPUT0"] == (numbers[0] * 2).tolist()
    client = InferenceGRPCClient(grpc)
    assert await client.is_server_live()
    assert await client.is_server_ready()
    assert await client.is_model_ready("simple")
    for binary in (False, True):
        check(await client.infer(request(binary)))


asyncio.run(main())
print("passed")
