"""tritonclient over gRPC, as its users call it. Arguments: address."""

import queue
import sys

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

client = triton.InferenceServerClient(sys.argv[1])
numbers = np.arange(16, dtype=np.int32).reshape(1, 16)


def inputs() -> list[triton.InferInput]:
    made = [triton.InferInput(name, [1, 16], "INT32") for name in ("INPUT0", "INPUT1")]
    for each in made:
        each.set_data_from_numpy(numbers)
    return made


assert client.is_server_live()
assert client.is_server_ready()
assert client.is_model_ready("simple")
assert not client.is_model_ready("nope")
assert "model_configuration" in client.get_server_metadata().extensions
assert list(client.get_model_metadata("simple").inputs[0].shape) == [-1, 16]
config = client.get_model_config("simple").config
assert (list(config.input[0].dims), config.max_batch_size > 0) == ([16], True)
assert {"simple", "simple_string"} <= {entry.name for entry in client.get_model_repository_index().models}

outputs = [triton.InferRequestedOutput("OUTPUT0"), triton.InferRequestedOutput("OUTPUT1")]
answer = client.infer(
    "simple", inputs(), outputs=outputs, request_id="7", timeout=10_000_000, priority=1, client_timeout=10,
    headers={"test": "1"}, compression_algorithm="gzip", parameters={"double": 0.5, "text": "a"},
)  # fmt: skip
assert (answer.as_numpy("OUTPUT0") == numbers * 2).all()
assert answer.get_response().id == "7"

done: "queue.Queue[tuple[object, object]]" = queue.Queue()
for _ in range(20):
    client.async_infer("simple", inputs(), lambda result, error: done.put((result, error)))
for _ in range(20):
    result, error = done.get(timeout=60)
    assert error is None
    assert (result.as_numpy("OUTPUT0") == numbers * 2).all()

client.start_stream(lambda result, error: done.put((result, error)))
for number in range(20):
    client.async_stream_infer("simple", inputs(), request_id=str(number))
client.async_stream_infer("nope", inputs(), request_id="bad")
client.async_stream_infer("simple", inputs(), request_id="after")
answers = [done.get(timeout=60) for _ in range(22)]
client.stop_stream()
assert {result.get_response().id for result, error in answers if error is None} == {*map(str, range(20)), "after"}
assert "Request for unknown model" in next(str(error) for _, error in answers if error is not None)

text = triton.InferInput("INPUT0", [1, 2], "BYTES")
text.set_data_from_numpy(np.array([["a", "ü"]], dtype=np.object_))
assert client.infer("simple_identity", [text]).as_numpy("OUTPUT0").tolist() == [[b"a", "ü".encode()]]
best = client.infer("simple", inputs(), outputs=[triton.InferRequestedOutput("OUTPUT0", class_count=2)])
assert best.as_numpy("OUTPUT0").tolist() == [[b"30:15", b"28:14"]]
statistics = client.get_inference_statistics("simple").model_stats[0]
assert statistics.inference_stats.success.count >= 40
try:
    client.infer("nope", inputs())
except InferenceServerException as error:
    assert error.message().startswith("Request for unknown model")
else:
    raise AssertionError("an unknown model was answered")
client.unload_model("identity_int8")
assert not client.is_model_ready("identity_int8")
client.load_model("identity_int8")
assert client.is_model_ready("identity_int8")
print("passed")
