"""``splitserve infer``: what people have in files, and what they want on standard output."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from splitserve.oip.messages import ModelMetadata
from splitserve.signature import TensorSpec
from splitserve.testing import FakeClient, fake, signature
from tests.command_line import run_command

ROWS = [{"size": 1.5, "word": "one"}, {"size": None, "word": None}]


def answer(inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    scores = np.array([[0.25, np.nan]] * len(inputs["size"]))
    return {"label": inputs["word"], "scores": scores}


@pytest.fixture
def model() -> Iterator[FakeClient]:
    with fake("m", answer, inputs={"size": "FP64", "word": "BYTES"}, labels={"scores": ["no", "yes"]}) as client:
        yield client


def infer(client: FakeClient, *arguments: Any) -> Any:
    return run_command("infer", "m", *arguments, "--url", client.url)


V2 = {
    "inputs": [
        {"name": "size", "datatype": "FP64", "shape": [2, 1], "data": [1.5, None]},
        {"name": "word", "datatype": "BYTES", "shape": [2, 1], "data": ["one", ""]},
    ]
}
FILES: dict[str, bytes] = {
    "records.json": json.dumps(ROWS).encode(),
    "with a mark.json": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "lines.jsonl": "\n".join(map(json.dumps, ROWS)).encode() + b"\n",
    "instances.json": json.dumps({"instances": ROWS}).encode(),
    "columns.json": json.dumps({"inputs": {"size": [1.5, None], "word": ["one", None]}}).encode(),
    "rows.csv": b"size,word\n1.5,one\n,NA\n",
    "marked.csv": b"\xef\xbb\xbfsize,word\r\n1.5,one\r\n\r\nnan,null\r\n",
    "utf16.csv": "size,word\n1.5,one\nNA,\n".encode("utf-16"),
}


@pytest.mark.parametrize("name", FILES)
def test_rows_in_every_form_are_the_same_request(model: FakeClient, tmp_path: Path, name: str) -> None:
    """Missing values are missing in all of them, as for a frame: text NA in CSV, null in JSON."""
    (tmp_path / name).write_bytes(FILES[name])

    result = infer(model, tmp_path / name)

    assert result.exit_code == 0, result.output
    np.testing.assert_array_equal(model.requests[0]["size"], [[1.5], [np.nan]])
    assert model.requests[0]["word"].tolist() == [["one"], [""]]


def test_the_body_of_a_v2_request_is_sent_as_it_is(model: FakeClient, tmp_path: Path) -> None:
    """What documents of the protocol show."""
    (tmp_path / "v2.json").write_text(json.dumps(V2).replace("null", "2.5"))

    assert infer(model, tmp_path / "v2.json").exit_code == 0
    assert model.requests[0]["size"].tolist() == [[1.5], [2.5]]


def test_one_record_needs_no_list(model: FakeClient) -> None:
    """As a value of --rows."""
    assert infer(model, "--rows", json.dumps(ROWS[0])).exit_code == 0
    assert model.requests[0]["word"].tolist() == [["one"]]


@pytest.mark.parametrize("rows", ["rows.csv", "./lines.jsonl", "@rows.json"])
def test_a_file_in_place_of_rows_is_named_as_such(model: FakeClient, rows: str) -> None:
    """The message has the command that reads it; JSON with a mistake gets no such advice."""
    result = infer(model, "--rows", rows)

    assert result.exit_code == 1
    assert "--rows is not JSON" in result.output
    assert f"a file is an argument: m {rows.removeprefix('@')}, without --rows" in result.output
    assert "a file is" not in infer(model, "--rows", '[{"size": 1').output


@pytest.mark.parametrize("name", ["lines.jsonl", "records.json", "rows.csv", "marked.csv"])
def test_standard_input_is_a_file(model: FakeClient, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A dash; what does not begin as JSON does is CSV."""
    from splitserve.cli import infer as command

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(FILES[name])))

    status = command.run("m", Path("-"), rows=None, url=model.url, version="", timeout_s=30)

    assert status == 0
    assert len(model.requests[0]["size"]) == 2


RECORDS = [{"label": "one", "scores_no": 0.25, "scores_yes": None}, {"label": "", "scores_no": 0.25, "scores_yes": None}]


def test_the_output_is_for_programs_on_request(model: FakeClient, tmp_path: Path) -> None:
    """JSON, JSON lines, CSV: nothing else is on standard output."""
    (tmp_path / "rows.json").write_bytes(FILES["records.json"])
    outputs = {form: infer(model, tmp_path / "rows.json", "--output", form).output for form in ("json", "jsonl", "csv", "table")}

    assert json.loads(outputs["json"]) == RECORDS
    assert [json.loads(line) for line in outputs["jsonl"].splitlines()] == RECORDS
    assert outputs["csv"] == "label,scores_no,scores_yes\none,0.25,\n,0.25,\n"
    assert outputs["table"].splitlines()[0].split() == ["m", "1.1"]
    assert outputs["table"].splitlines()[1].split() == ["label", "scores_no", "scores_yes"]


REFUSED: dict[str, tuple[bytes, str]] = {
    "a short line": (b"size,word\n1,one\n2\n", "line 3: expected 2 cells, got 1"),
    "a long line": (b"size,word\n1,one,x\n", "line 2: expected 2 cells, got 3"),
    "no number": (b"size,word\nbig,one\n", 'line 2: "big" is not a number'),
    "no header": (b"one,two\n3,four\n", 'names no input of the model, expected a header with "size", "word"'),
    "numbers as a header": (b"1,2\n3,4\n", "the first line has numbers, expected a header; --no-header"),
    "another encoding": ("size,word\n1,é\n".encode("latin-1"), "name its encoding, e.g. --encoding latin-1"),
    "nothing": (b"", "expected a header, got an empty file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_in_a_csv_file_is_named(model: FakeClient, tmp_path: Path, name: str) -> None:
    """By line; nothing is sent."""
    data, message = REFUSED[name]
    (tmp_path / "rows.csv").write_bytes(data)

    result = infer(model, tmp_path / "rows.csv")

    assert result.exit_code == 1
    assert message in result.output
    assert model.requests == []


def test_encoding_and_header_are_options(model: FakeClient, tmp_path: Path) -> None:
    """Cells of a file without a header are in the order of the signature."""
    (tmp_path / "rows.csv").write_bytes("1,é\n".encode("latin-1"))

    result = infer(model, tmp_path / "rows.csv", "--encoding", "latin-1", "--no-header")

    assert result.exit_code == 0, result.output
    assert model.requests[0]["word"].tolist() == [["é"]]


def array_model(**properties: str) -> ModelMetadata:
    import msgspec

    metadata = signature("m", [TensorSpec("features", "FP32", ("batch", 2))])
    return msgspec.structs.replace(metadata, properties=properties)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [(array_model(), [[2, 1]]), (array_model(input_columns='["a", "b"]'), [[1, 2]])],
    ids=["in the order of the file", "by the names recorded at publish"],
)
def test_columns_of_an_only_input(tmp_path: Path, metadata: ModelMetadata, expected: list[list[float]]) -> None:
    """Matched by name, if the model knows them."""
    (tmp_path / "rows.csv").write_text("b,a\n2,1\n")

    with fake(metadata, lambda inputs: {"y": inputs["features"]}, over="grpc") as client:
        result = infer(client, tmp_path / "rows.csv")

        assert result.exit_code == 0, result.output
        assert client.requests[0]["features"].tolist() == expected


def test_pixels_are_sent_to_models_that_take_them(tmp_path: Path) -> None:
    """An image file is opened then."""
    Image.fromarray(np.array([[1, 2], [3, 4]], np.uint8)).save(tmp_path / "image.png")
    metadata = signature("m", [TensorSpec("image", "UINT8", ("batch", 2, 2))])

    with fake(metadata, {"label": ["seven"]}) as client:
        result = infer(client, tmp_path / "image.png")

        assert "seven" in result.output
        assert client.requests[0]["image"].tolist() == [[[1, 2], [3, 4]]]


def test_health_is_shown_over_both_protocols(model: FakeClient) -> None:
    """By the same address as for infer."""
    for url in (model.rest_url, model.grpc_url):
        result = run_command("health", "--url", url)

        assert result.exit_code == 0, result.output
        assert result.output.splitlines()[1].split() == ["m", "1.1", "-", "READY"]
