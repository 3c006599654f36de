"""tritonclient's asyncio clients over REST and gRPC. Arguments: address of each."""

import asyncio
import sys

import numpy as np
import tritonclient.grpc.aio as over_grpc
import tritonclient.http.aio as over_http

numbers = np.arange(16, dtype=np.int32).reshape(1, 16)


async def check(module: object, address: str) -> None:
    async with module.InferenceServerClient(address) as client:
        inputs = [module.InferInput(name, [1, 16], "INT32") for name in ("INPUT0", "INPUT1")]
        for each in inputs:
            each.set_data_from_numpy(numbers)
        assert await client.is_server_ready()
        answers = await asyncio.gather(*(client.infer("simple", inputs) for _ in range(20)))
        assert all((answer.as_numpy("OUTPUT0") == numbers * 2).all() for answer in answers)


async def check_stream(address: str) -> None:
    async with over_grpc.InferenceServerClient(address) as client:
        inputs = [over_grpc.InferInput(name, [1, 16], "INT32") for name in ("INPUT0", "INPUT1")]
        for each in inputs:
            each.set_data_from_numpy(numbers)

        async def requests() -> object:
            for number in range(5):
                yield {"model_name": "simple", "inputs": inputs, "request_id": str(number)}

        identities = set()
        async for result, error in client.stream_infer(requests()):
            assert error is None
            identities.add(result.get_response().id)
        assert identities == set("01234")


asyncio.run(check(over_http, sys.argv[1]))
asyncio.run(check(over_grpc, sys.argv[2]))
asyncio.run(check_stream(sys.argv[2]))
print("passed")
