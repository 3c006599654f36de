"""The demo models answer over every face what the pipeline that they were published from answers in process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tritonclient.grpc
import tritonclient.http
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from splitserve import Client, publish
from tests.demo_models import Demo, Demos
from tests.system.processes import System

N_ROWS = 40
TOLERANCE = 1e-4


def inputs_of(rows: Any, input_name: str) -> dict[str, np.ndarray]:
    """What a client sends for these rows: a column each, or one array."""
    if not hasattr(rows, "columns"):
        return {input_name: rows}
    return {name: rows[name].to_numpy().reshape(-1, 1) for name in rows.columns}


def instances_of(rows: Any) -> list[Any]:
    """The same as V1 instances: missing values are null."""
    if not hasattr(rows, "columns"):
        return rows.tolist()
    records = rows.astype(object).where(rows.notna(), None).to_dict("records")
    return [{name: value.item() if hasattr(value, "item") else value for name, value in record.items()} for record in records]


def via_client(system: System, model: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    with Client(system.grpc) as client:
        return client.infer(model, inputs)


def via_triton(module: Any, address: str, model: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    from tritonclient.utils import np_to_triton_dtype

    tensors = []
    for name, array in inputs.items():
        if array.dtype == object:
            array = np.array([["" if value != value else value] for value in array.ravel()], dtype=object)
        tensor = module.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        tensors.append(tensor)
    with module.InferenceServerClient(address) as client:
        answer = client.infer(model, tensors)
        return {name: answer.as_numpy(name) for name in ("label", "probabilities")}


def via_rest(system: System, model: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    datatypes = {"f": "FP64", "i": "INT64", "u": "UINT8", "O": "BYTES"}
    status, answer = system.rest(
        f"/v2/models/{model}/infer",
        {
            "inputs": [
                {
                    "name": name,
                    "datatype": datatypes[array.dtype.kind],
                    "shape": array.shape,
                    "data": [None if value != value else value for value in array.ravel().tolist()],
                }
                for name, array in inputs.items()
            ]
        },
    )
    assert status == 200, answer
    return {output["name"]: np.array(output["data"]).reshape(output["shape"]) for output in answer["outputs"]}


WAYS = {
    "client": lambda system, model, inputs: via_client(system, model, inputs),
    "triton-grpc": lambda system, model, inputs: via_triton(tritonclient.grpc, system.grpc, model, inputs),
    "triton-http": lambda system, model, inputs: via_triton(tritonclient.http, system.http, model, inputs),
    "rest": via_rest,
}


def text(labels: np.ndarray) -> list[str]:
    return [label.decode() if isinstance(label, bytes) else str(label) for label in labels.tolist()]


def check(answer: dict[str, np.ndarray], demo: Demo, rows: Any) -> None:
    assert text(answer["label"]) == text(demo.pipeline.predict(rows))
    np.testing.assert_allclose(answer["probabilities"], demo.pipeline.predict_proba(rows), atol=TOLERANCE)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("model", "input_name"), [("penguins", ""), ("breast-cancer", "features"), ("digits", "image")])
def test_every_interface_gives_the_answer_of_the_pipeline(
    system: System, demos: Demos, model: str, input_name: str, way: str
) -> None:
    """Labels are the same and probabilities within 1e-4, with the missing values that the data has."""
    demo = demos.models[model]
    rows = demo.rows[:N_ROWS]

    answer = WAYS[way](system, model, inputs_of(rows, input_name))

    check(answer, demo, rows)


@pytest.mark.parametrize("model", ["penguins", "breast-cancer", "digits"])
def test_v1_instances_give_the_answer_of_the_pipeline(system: System, demos: Demos, model: str) -> None:
    """Instances are records by column name, or rows; null is a missing value."""
    demo = demos.models[model]
    rows = demo.rows[:N_ROWS]

    status, answer = system.rest(f"/v1/models/{model}:predict", {"instances": instances_of(rows)})

    assert status == 200, answer
    columns = {name: np.array([row[name] for row in answer["predictions"]]) for name in ("label", "probabilities")}
    check(columns, demo, rows)


def test_a_missing_value_is_nan_an_empty_string_or_null(system: System, demos: Demos) -> None:
    """All three mean the same as a NaN in the DataFrame, also in a column without missing values in training."""
    demo = demos.models["penguins"]
    row = demo.rows.iloc[[0]].copy()
    for name in ("bill_length_mm", "sex", "island"):
        row[name] = row[name].where([False])
    record = instances_of(row)[0]

    _, as_null = system.rest("/v1/models/penguins:predict", {"instances": [record]})
    _, as_text = system.rest(
        "/v1/models/penguins:predict", {"instances": [{**record, "bill_length_mm": "NaN", "sex": "", "island": ""}]}
    )
    over_grpc = via_client(system, "penguins", inputs_of(row, ""))

    check(over_grpc, demo, row)
    assert as_null == as_text
    np.testing.assert_allclose(as_null["predictions"][0]["probabilities"], over_grpc["probabilities"][0], atol=1e-7)


def test_float32_columns_are_accepted_where_training_had_float64(system: System, demos: Demos) -> None:
    """Narrower numbers are widened: clients need not send doubles."""
    demo = demos.models["breast-cancer"]
    rows = demo.rows[:N_ROWS].astype(np.float32)

    answer = via_client(system, "breast-cancer", {"features": rows})

    check(answer, demo, rows)


def test_no_rows_give_no_answers(system: System) -> None:
    """An empty batch is a batch."""
    answer = via_client(system, "breast-cancer", {"features": np.empty((0, 30))})

    assert answer["probabilities"].shape == (0, 2)
    assert answer["label"].shape == (0,)


def test_only_requested_outputs_are_returned_in_the_requested_order(system: System) -> None:
    """The answer contains only these."""
    with Client(system.grpc) as client:
        answer = client.infer("digits", {"image": np.zeros((1, 8, 8), np.uint8)}, outputs=["probabilities"])

    assert list(answer) == ["probabilities"]


def test_the_answer_names_the_pair_that_gave_it(system: System) -> None:
    """``model_version`` is the pair, whether the caller named it or not."""
    request = {"inputs": [{"name": "image", "datatype": "UINT8", "shape": [1, 8, 8], "data": [0] * 64}]}

    _, chosen = system.rest("/v2/models/digits/infer", request)
    _, named = system.rest("/v2/models/digits/versions/1.1/infer", {**request, "id": "seven"})

    assert (chosen["model_name"], chosen["model_version"]) == ("digits", "1.1")
    assert "id" not in chosen
    assert (named["model_version"], named["id"]) == ("1.1", "seven")


@pytest.fixture(scope="module")
def with_unused_columns(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[System, Demo]]:
    """A model whose transforms select one of three columns, served split."""
    rows = pd.DataFrame({"id": range(N_ROWS), "age": np.arange(N_ROWS) % 7 / 2, "note": ["a", "b"] * (N_ROWS // 2)})
    pipeline = make_pipeline(make_column_transformer((StandardScaler(), ["age"])), LogisticRegression())
    demo = Demo(pipeline.fit(rows, rows["age"] > 1), rows)
    repository = tmp_path_factory.mktemp("unused")
    publish(*demo, name="ages", repository=repository)
    running = System(repository).wait_until_settled()
    yield running, demo
    running.stop()


@pytest.mark.parametrize("columns", [["age"], ["id", "age", "note"]], ids=["only what is used", "all columns"])
@pytest.mark.parametrize("way", WAYS)
def test_columns_that_no_transform_selects_may_be_sent(
    with_unused_columns: tuple[System, Demo], way: str, columns: list[str]
) -> None:
    """Or not, by clients that know nothing of it, too: the answer is the same."""
    system, demo = with_unused_columns

    answer = WAYS[way](system, "ages", inputs_of(demo.rows[columns], ""))

    check(answer, demo, demo.rows)
