"""Our package and other clients of the protocol in one process: each registers the package ``inference`` with protobuf."""

from __future__ import annotations

import subprocess
import sys

import pytest

OURS = "import splitserve.client; from splitserve.api.inference import inference_pb2 as ours"
GRPC = "import tritonclient.grpc; from tritonclient.grpc import service_pb2 as theirs"
HTTP = "import tritonclient.http"

MAKE_ONE_OF_EACH = """
mine = ours.ModelInferRequest(model_name="penguins")
other = theirs.ModelInferRequest(model_name="penguins")
tritonclient.grpc.InferInput("age", [1, 1], "FP32")
tritonclient.http.InferInput("age", [1, 1], "FP32")
assert type(mine) is not type(other)
assert mine.SerializeToString() == other.SerializeToString()
"""


@pytest.mark.parametrize("imports", [(OURS, GRPC, HTTP), (HTTP, GRPC, OURS)], ids=["ours-first", "ours-last"])
@pytest.mark.heavy
def test_both_clients_live_in_one_process(imports):
    """tritonclient and our client can be used in one process, whichever is imported first."""
    program = "\n".join((*imports, MAKE_ONE_OF_EACH))

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)

    assert (done.returncode, done.stderr) == (0, "")
