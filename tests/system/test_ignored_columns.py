"""A model is asked with the rows that it was published with, whatever columns of them no transform selects."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from splitserve import Client, publish
from splitserve.errors import InvalidInput
from splitserve.oip.messages import InferRequest, deadline_after
from splitserve.remote.inference import RemoteInference
from splitserve.tensors import Tensor, encode_bytes
from tests.system.processes import System

COMMAND = Path(sys.executable).with_name("splitserve")
N = 40
X = pd.DataFrame(
    {
        "id": [f"customer {number}" for number in range(N)],
        "seen": [{"pages": number} for number in range(N)],
        "amount": np.arange(N) * 1.5,
        "colour": ["red", "blue"] * (N // 2),
    }
)
USED = ["amount", "colour"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """The repository, and the pipeline's answers."""
    folder = tmp_path_factory.mktemp("models")
    transforms = make_column_transformer((StandardScaler(), ["amount"]), (OneHotEncoder(), ["colour"]))
    pipeline = make_pipeline(transforms, LogisticRegression()).fit(X, np.arange(N) // 8 % 2)
    publish(pipeline, X, name="m", repository=folder)
    return folder, pipeline.predict(X).tolist()


@pytest.fixture(scope="module")
def system(expected: tuple[Path, list[int]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    system = System(expected[0], is_fused=True, JOBS_DIR=str(tmp_path_factory.mktemp("jobs")))
    system.wait_until_settled()
    yield system
    system.stop()


def url(system: System, face: str) -> str:
    return system.grpc if face == "gRPC" else f"http://{system.http}"


@pytest.mark.parametrize("face", ["gRPC", "REST"])
def test_the_client_takes_the_rows_of_training(system: System, expected: Any, face: str) -> None:
    """As a frame, also one of a type that cannot be sent, as columns, and as a job."""
    columns = {"id": X["id"].tolist(), "amount": X["amount"].tolist(), "colour": X["colour"].tolist()}

    with Client(url(system, face)) as client:
        answers = [client.infer("m", X), client.infer("m", columns), client.infer("m", X[USED]), client.submit("m", X).result(60)]

    assert [answer["label"].tolist() for answer in answers] == [expected[1]] * 4


@pytest.mark.parametrize("face", ["gRPC", "REST"])
def test_a_column_that_is_neither_used_nor_known_is_refused(system: System, face: str) -> None:
    with (
        Client(url(system, face)) as client,
        pytest.raises(InvalidInput, match='unknown input "size", expected "amount", "colour"'),
    ):
        client.infer("m", X.assign(size=1.0))


def test_rows_in_the_v1_protocol(system: System, expected: Any) -> None:
    """By row and by column."""
    records, columns = X.to_dict("records"), X.to_dict("list")

    by_row = system.rest("/v1/models/m:predict", {"instances": records})
    by_column = system.rest("/v1/models/m:predict", {"inputs": columns})
    unknown = system.rest("/v1/models/m:predict", {"instances": [{**records[0], "size": 1}]})

    assert [row["label"] for row in by_row[1]["predictions"]] == by_column[1]["outputs"]["label"] == expected[1]
    assert (unknown[0], unknown[1]["error"]) == (400, 'instance 0: unknown "size", expected "amount", "colour"')


def test_a_rest_client_that_knows_nothing_of_it(system: System, expected: Any) -> None:
    """It finds the names in the metadata, and may send them."""
    inputs = [
        {"name": "id", "datatype": "BYTES", "shape": [N, 1], "data": X["id"].tolist()},
        {"name": "colour", "datatype": "BYTES", "shape": [N, 1], "data": X["colour"].tolist()},
        {"name": "amount", "datatype": "FP64", "shape": [N, 1], "data": X["amount"].tolist()},
    ]

    metadata = system.rest("/v2/models/m")[1]
    status, answer = system.rest("/v2/models/m/infer", {"inputs": inputs})

    assert json.loads(metadata["properties"]["ignored_inputs"]) == ["id", "seen"]
    assert [spec["name"] for spec in metadata["inputs"]] == USED
    assert (status, answer["outputs"][0]["data"]) == (200, expected[1])


async def test_a_grpc_client_that_knows_nothing_of_it(system: System, expected: Any) -> None:
    """Of any datatype and number of rows, since it is not looked at."""
    inputs = (
        Tensor("id", "INT8", (3,), b"abc"),
        Tensor("amount", "FP64", (N, 1), X["amount"].to_numpy().tobytes()),
        Tensor("colour", "BYTES", (N, 1), encode_bytes([value.encode() for value in X["colour"]])),
    )

    async with RemoteInference(system.grpc, stage="proxy") as remote:
        response = await remote.infer(InferRequest("m", inputs, deadline=deadline_after(60)))

    assert np.frombuffer(response.outputs[0].raw, np.int64).tolist() == expected[1]


@pytest.mark.parametrize("command", [["infer"], ["jobs", "submit", "--wait"]], ids=" ".join)
def test_the_commands_take_records_of_training(system: System, expected: Any, tmp_path: Path, command: list[str]) -> None:
    X.to_json(tmp_path / "rows.json", orient="records")

    done = subprocess.run(
        [COMMAND, *command, "m", tmp_path / "rows.json", "--url", system.grpc], capture_output=True, text=True, check=True
    )

    assert [int(line.split()[0]) for line in done.stdout.splitlines()[2:]] == expected[1]
