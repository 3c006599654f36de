"""`splitserve.testing.fake`: what application developers test with."""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tritonclient.grpc
import tritonclient.http

from splitserve import Client
from splitserve.errors import Internal, InvalidInput, NotFound, Overloaded
from splitserve.signature import TensorSpec
from splitserve.testing import FakeClient, fake, signature

PENGUIN = {"island": "Dream", "bill_length_mm": 50.0}
COLUMNS = {"island": "BYTES", "bill_length_mm": "FP64"}


@pytest.fixture(params=["rest", "grpc"])
def over(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_a_fake_answers_as_told_and_remembers_what_it_was_asked(over: Any) -> None:
    """Over either protocol, to its own client and to that of the application under test."""
    with (
        fake("penguins", {"label": ["Gentoo"]}, inputs=COLUMNS, over=over) as client,
        Client(client.grpc_url) as other,
        Client(client.rest_url) as another,
    ):
        answers = [each.infer("penguins", pd.DataFrame([PENGUIN])) for each in (client, other, another)]

    assert [(each["label"].tolist(), each.version) for each in answers] == [(["Gentoo"], "1.1")] * 3
    assert [each["island"].tolist() for each in client.requests] == [[["Dream"]]] * 3


def test_the_answer_can_follow_from_the_inputs(over: Any) -> None:
    """By a function of arrays; a function that fails says so to whoever reads the test's output."""

    def answer(inputs: dict[str, np.ndarray]) -> dict[str, Any]:
        return {"probabilities": np.hstack([inputs["x"], 1 - inputs["x"]])}

    with fake("m", answer, inputs={"x": "FP64"}, labels={"probabilities": ["yes", "no"]}, over=over) as client:
        records = client.infer("m", {"x": [0.25, 1]}).to_records()
        with pytest.raises(InvalidInput, match="expected numbers"):
            client.infer("m", {"x": ["text"]})
    with fake("m", lambda inputs: inputs["y"], over=over) as client, pytest.raises(Internal, match="raised KeyError: 'y'"):
        client.infer("m", {"x": [1]})

    assert records == [
        {"probabilities_yes": 0.25, "probabilities_no": 0.75},
        {"probabilities_yes": 1.0, "probabilities_no": 0.0},
    ]


def test_errors_can_be_told(over: Any) -> None:
    """As the services raise them; other models are unknown."""
    with fake("m", Overloaded("full"), over=over, max_attempts=1) as client:
        with pytest.raises(Overloaded, match="full"):
            client.infer("m", {"x": [1]})
        with pytest.raises(NotFound, match="other"):
            client.infer("other", {"x": [1]})
        assert client.is_ready()
        assert client.is_model_ready("m")
        assert not client.is_model_ready("other")
        assert [state.name for state in client.models()] == ["m"]
        assert client.server_metadata().name == "splitserve-fake"


def test_a_signature_is_what_requests_are_checked_against(over: Any) -> None:
    """As by the services."""
    metadata = signature("m", [TensorSpec("x", "FP32", ("batch", 2))])

    with fake(metadata, lambda inputs: {"n": inputs["x"].sum(axis=1)}, over=over) as client:
        assert client.infer("m", [[1, 2]])["n"].tolist() == [3]
        with pytest.raises(InvalidInput, match='"x"'):
            client.infer("m", [[1, 2, 3]])


def test_other_clients_of_the_protocol_are_answered() -> None:
    """NVIDIA's, over both."""
    with fake("m", lambda inputs: {"y": inputs["x"] * 2}) as client:
        for module, address in (
            (tritonclient.http, client.rest_url.removeprefix("http://")),
            (tritonclient.grpc, client.grpc_url.removeprefix("grpc://")),
        ):
            x = module.InferInput("x", [1, 1], "FP32")
            x.set_data_from_numpy(np.ones((1, 1), np.float32))
            with module.InferenceServerClient(address) as other:
                assert other.infer("m", [x]).as_numpy("y").tolist() == [[2]]


def test_a_client_that_gives_up_is_no_error_of_the_fake(capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing is written to the terminal of a test that cancels calls, or lets them time out."""
    with fake("penguins", {"label": ["Adelie"]}) as client:
        host, port = client.rest_url.removeprefix("http://").split(":")
        for sent in (b"", b"POST /v2/models/penguins/infer HTTP/1.1\r\ncontent-length: 100\r\n\r\n{"):
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(sent)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close by RST
        assert client.is_live()

    assert capfd.readouterr().err == ""


def test_fakes_are_a_fixture(splitserve_fake: Callable[..., FakeClient]) -> None:
    """Of the plugin that comes with the package; as many as a test needs."""
    one, two = splitserve_fake("one", {"y": [1]}), splitserve_fake("two", {"y": [2]}, over="grpc")

    assert [client.infer(name, {"x": [0]})["y"].tolist() for name, client in (("one", one), ("two", two))] == [[1], [2]]


@pytest.mark.heavy
def test_a_fake_needs_no_packages_of_services() -> None:
    """What the extra client brings is enough."""
    program = """
import sys
from splitserve.testing import fake
with fake("m", {"y": [1]}, inputs={"x": "FP64"}) as client:
    assert client.infer("m", {"x": [1]})["y"].tolist() == [1]
found = {name.partition(".")[0] for name in sys.modules} & {
    "structlog", "pydantic", "pydantic_settings", "uvloop", "sklearn", "pandas", "onnxruntime", "httptools"}
assert not found, found
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)

    assert (done.returncode, done.stderr) == (0, "")
