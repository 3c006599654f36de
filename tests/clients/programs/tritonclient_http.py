"""tritonclient over REST, as its users call it. Arguments: address."""

import sys

import numpy as np
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

client = triton.InferenceServerClient(sys.argv[1], concurrency=4)
numbers = np.arange(16, dtype=np.int32).reshape(1, 16)


def inputs(binary: bool) -> list[triton.InferInput]:
    made = [triton.InferInput(name, [1, 16], "INT32") for name in ("INPUT0", "INPUT1")]
    for each in made:
        each.set_data_from_numpy(numbers, binary_data=binary)
    return made


assert client.is_server_live()
assert client.is_server_ready()
assert client.is_model_ready("simple")
assert not client.is_model_ready("nope")
assert "statistics" in client.get_server_metadata()["extensions"]
assert client.get_model_metadata("simple", query_params={"test_1": 1})["inputs"][0]["shape"] == [-1, 16]
assert client.get_model_config("simple")["input"][0]["dims"] == [16]
assert {"simple", "simple_string"} <= {entry["name"] for entry in client.get_model_repository_index()}

for binary in (True, False):
    outputs = [triton.InferRequestedOutput("OUTPUT0", binary_data=binary), triton.InferRequestedOutput("OUTPUT1")]
    answer = client.infer("simple", inputs(binary), outputs=outputs, request_id="7", timeout=10_000_000, priority=1)
    assert (answer.as_numpy("OUTPUT0") == numbers * 2).all()
    assert (answer.as_numpy("OUTPUT1") == 0).all()
    assert answer.get_response()["id"] == "7"
assert (client.infer("simple", inputs(True)).as_numpy("OUTPUT0") == numbers * 2).all()

for algorithm in ("gzip", "deflate"):
    answer = client.infer(
        "simple", inputs(True), request_compression_algorithm=algorithm, response_compression_algorithm=algorithm
    )
    assert (answer.as_numpy("OUTPUT0") == numbers * 2).all()

pending = [client.async_infer("simple", inputs(True)) for _ in range(20)]
assert all((each.get_result().as_numpy("OUTPUT0") == numbers * 2).all() for each in pending)

text = triton.InferInput("INPUT0", [1, 2], "BYTES")
text.set_data_from_numpy(np.array([["a", "ü"]], dtype=np.object_))
assert client.infer("simple_identity", [text]).as_numpy("OUTPUT0").tolist() == [[b"a", "ü".encode()]]

best = client.infer("simple", inputs(True), outputs=[triton.InferRequestedOutput("OUTPUT0", class_count=2)])
assert best.as_numpy("OUTPUT0").tolist() == [[b"30:15", b"28:14"]]

for datatype, dtype in (
    ("FP16", np.float16),
    ("FP32", np.float32),
    ("FP64", np.float64),
    ("BOOL", np.bool_),
    ("UINT64", np.uint64),
):
    array = np.array([[0, 1, 1]], dtype=dtype)
    tensor = triton.InferInput("INPUT0", array.shape, datatype)
    tensor.set_data_from_numpy(array)
    back = client.infer(f"identity_{datatype.lower()}", [tensor]).as_numpy("OUTPUT0")
    assert back.dtype == dtype
    assert (back == array).all()

statistics = client.get_inference_statistics("simple")["model_stats"][0]
assert statistics["inference_stats"]["success"]["count"] >= 26
try:
    client.infer("nope", inputs(True))
except InferenceServerException as error:
    assert error.message().startswith("Request for unknown model")
else:
    raise AssertionError("an unknown model was answered")
client.unload_model("simple_string")
assert not client.is_model_ready("simple_string")
client.load_model("simple_string")
assert client.is_model_ready("simple_string")
print("passed")
