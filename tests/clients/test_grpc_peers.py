"""gRPC clients in other languages and of other ages, each on a connection of its own to the proxy's gRPC port.

Each program of ``programs/peer*`` runs the same scenarios. It is given the bytes of messages in a folder: ``NAME.request``, and
``NAME.answer`` that must come back.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pb2

from splitserve.api.inference import inference_pb2 as pb
from splitserve.oip.protobuf import SERVICE
from tests.clients.conftest import ENVIRONMENTS, PROGRAMS, run_command
from tests.intermediaries.backends import Backend, Stage
from tests.intermediaries.calls import OPTIONS, echo_request, hold_request
from tests.wire.fakes import framed

pytestmark = [pytest.mark.intermediaries, pytest.mark.timeout(240)]

MIB = 1024 * 1024
NODE = ENVIRONMENTS / "node"
PEERS: dict[str, list[str | Path]] = {
    "grpcio, oldest": [ENVIRONMENTS / "grpcio-oldest" / "bin" / "python", PROGRAMS / "peer_grpcio.py"],
    "grpcio, newest": [ENVIRONMENTS / "grpcio-newest" / "bin" / "python", PROGRAMS / "peer_grpcio.py"],
    "grpclib": [ENVIRONMENTS / "grpclib" / "bin" / "python", PROGRAMS / "peer_grpclib.py"],
    "grpc-js": ["node", PROGRAMS / "peer_grpc_js.cjs"],
    "connect-node": ["node", PROGRAMS / "peer_connect_node.mjs"],
    "grpc-go": [ENVIRONMENTS / "go" / "peer"],
}
BUSY_S = 12.0
"""How long the programs keep their event loop busy in the scenario "busy"."""


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    stage = Stage()
    backend = Backend(stage.address)
    yield backend
    backend.stop()
    stage.stop()


@pytest.fixture(scope="module")
def messages(backend: Backend, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of requests and answers; the answers are those of the proxy, after a look at them."""
    folder = tmp_path_factory.mktemp("messages")
    requests = {
        "small": echo_request(b"small", "1"),
        "large": echo_request(bytes(range(256)) * (60 * MIB // 256)),
        "held": hold_request(5_000),
    }
    with grpc.insecure_channel(backend.grpc, OPTIONS) as channel:
        for name, request in requests.items():
            answer = channel.unary_unary(f"/{SERVICE}/ModelInfer")(request.SerializeToString())
            assert pb.ModelInferResponse.FromString(answer).raw_output_contents == request.raw_input_contents
            (folder / f"{name}.request").write_bytes(request.SerializeToString())
            (folder / f"{name}.answer").write_bytes(answer)
    streamed = pb.ModelStreamInferResponse(
        infer_response=pb.ModelInferResponse.FromString((folder / "small.answer").read_bytes())
    )
    (folder / "small.streamed").write_bytes(streamed.SerializeToString())
    (folder / "missing.request").write_bytes(pb.ModelInferRequest(model_name="missing").SerializeToString())
    file = descriptor_pb2.FileDescriptorProto.FromString(pb.DESCRIPTOR.serialized_pb)
    (folder / "descriptors").write_bytes(descriptor_pb2.FileDescriptorSet(file=[file]).SerializeToString())
    return folder


def command(peer: str, backend: Backend, messages: Path, scenario: str) -> list[str | Path]:
    return [*PEERS[peer], backend.grpc, messages, scenario, NODE]


@pytest.mark.parametrize("scenario", ["unary", "error", "stream", "large", "thousand"])
@pytest.mark.parametrize("peer", PEERS)
def test_a_client_gets_its_answers(backend: Backend, messages: Path, peer: str, scenario: str) -> None:
    """100 calls; an error with details; 200 messages on a stream; 60 MiB each way; 1,000 calls at once on one connection."""
    assert "passed" in run_command(*command(peer, backend, messages, scenario))


@pytest.mark.parametrize("scenario", ["busy", "keepalive"])
def test_a_client_is_not_given_up(backend: Backend, messages: Path, scenario: str) -> None:
    """One whose event loop is busy for 12 s in the middle of a call, and one that pings each second; all clients side by side."""
    running = {
        peer: subprocess.Popen(
            command(peer, backend, messages, scenario), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for peer in PEERS
    }
    outputs = {peer: process.communicate(timeout=120)[0] for peer, process in running.items()}

    assert {peer: output for peer, output in outputs.items() if "passed" not in output} == {}


@pytest.mark.parametrize(("n_connections", "n_at_once"), [(1, 1), (1, 1000), (16, 4)])
def test_h2load(backend: Backend, tmp_path: Path, n_connections: int, n_at_once: int) -> None:
    """3,000 calls, each answered in full."""
    body = tmp_path / "body"
    body.write_bytes(framed(echo_request(b"x" * 100).SerializeToString()))
    output = run_command(
        "h2load", "-n", "3000", "-c", str(n_connections), "-m", str(n_at_once), "-d", body,
        "-H", "content-type: application/grpc", "-H", "te: trailers", f"http://{backend.grpc}/{SERVICE}/ModelInfer",
    )  # fmt: skip

    assert re.search(r"3000 total, 3000 started, 3000 done, 3000 succeeded, 0 failed, 0 errored, 0 timeout", output), output
    with grpc.insecure_channel(backend.grpc) as channel:
        answer = channel.unary_unary(f"/{SERVICE}/ModelInfer")(echo_request(b"x" * 100).SerializeToString())
    data = re.search(r"\((\d+)\) data", output)
    assert data, output
    assert int(data[1]) == 3000 * len(framed(answer))
