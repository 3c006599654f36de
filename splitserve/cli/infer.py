"""``splitserve infer``: rows from a file to a running system, the answer as a table."""

from __future__ import annotations

import asyncio
import csv
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from splitserve.cli.connection import connect
from splitserve.cli.tables import print_table
from splitserve.errors import InvalidInput, SplitserveError
from splitserve.oip.classification import LABELS, labels_of
from splitserve.oip.messages import DEFAULT, InferResponse, ModelMetadata, deadline_after
from splitserve.oip.rest import decode_json
from splitserve.oip.v1 import from_instances
from splitserve.tensors import DATATYPES, Tensor, unpack

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
N_SHOWN = 5
"""Of a long row of numbers, this many are shown: the largest, with their classes or indices."""


def run(model: str, file: Path | None, *, rows: str | None, url: str, version: str, timeout_s: float) -> int:
    """Print a row for each row sent; 1 and the reason if that fails."""
    if (file is None) == (rows is None):
        print("expected a file or --rows, got both or neither", file=sys.stderr)
        return 2
    try:
        response, metadata = asyncio.run(_infer(model, reader(file, rows), url, version, timeout_s))
    except (SplitserveError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{response.model} {response.version}")
    print_outputs(response.outputs, metadata)
    return 0


def print_outputs(outputs: Sequence[Tensor], metadata: ModelMetadata) -> None:
    """Print the outputs of an answer as a table, with the labels that the model's metadata has."""
    columns = [column for tensor in outputs for column in _columns(tensor, labels_of(metadata, tensor.name))]
    print_table([name for name, _ in columns], zip(*(cells for _, cells in columns), strict=True))


def reader(file: Path | None, rows: str | None) -> Callable[[ModelMetadata], list[Any]]:
    """A function from the model's metadata to the instances in the input."""
    if rows is not None:
        return lambda _: _from_json(rows.encode(), "--rows")
    assert file is not None, "run checks it"
    if str(file) == "-":
        return lambda _: _from_json(sys.stdin.buffer.read(), "standard input")
    if file.suffix.lower() in IMAGE_SUFFIXES:
        return lambda _: [file.read_bytes()]
    if file.suffix.lower() == ".csv":
        return lambda metadata: _from_csv(file, metadata)
    return lambda _: _from_json(file.read_bytes(), str(file))


def _from_json(text: bytes, what: str) -> list[Any]:
    content = decode_json(text, what=what)
    instances = content.get("instances") if isinstance(content, dict) else content
    if not isinstance(instances, list):
        raise InvalidInput(f'{what}: expected a list of rows or records, or an object with one in "instances"')
    return instances


def _from_csv(file: Path, metadata: ModelMetadata) -> list[Any]:
    """Records by column name; columns without an input are omitted, empty cells are missing values."""
    datatypes = {spec.name: spec.datatype for spec in metadata.inputs}
    with file.open(newline="", encoding="utf-8") as lines:
        records = list(csv.DictReader(lines))
    is_table = len(metadata.inputs) == 1 and metadata.inputs[0].name not in (records[0] if records else {})
    if is_table:  # one input that takes all columns
        datatype = metadata.inputs[0].datatype
        return [[_value(cell, datatype) for cell in record.values()] for record in records]
    return [{name: _value(cell, datatypes[name]) for name, cell in record.items() if name in datatypes} for record in records]


def _value(cell: str, datatype: str) -> Any:
    if datatype == "BYTES":
        return cell
    if cell.strip() in ("", "NA", "NaN", "nan"):
        return None
    if datatype == "BOOL":
        return cell.strip().lower() in ("1", "true", "yes")
    try:
        number = float(cell)
    except ValueError:
        raise InvalidInput(f'"{cell[:32]}" is not a number') from None
    return int(number) if DATATYPES[datatype].is_integer and number.is_integer() else number


async def _infer(
    model: str, read: Callable[[ModelMetadata], list[Any]], url: str, version: str, timeout_s: float
) -> tuple[InferResponse, ModelMetadata]:
    """The answer, and the metadata of the version that gave it."""
    deadline = deadline_after(timeout_s)
    async with connect(url) as remote:
        metadata = await remote.metadata(model, version)
        instances = read(metadata)
        response = await remote.infer(from_instances(instances, metadata, version, deadline=deadline))
        if LABELS in metadata.properties and response.version not in (version, metadata.properties.get(DEFAULT)):
            metadata = await remote.metadata(response.model, response.version)
        return response, metadata


def _columns(tensor: Tensor, labels: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Name and cells of each column of the table that shows an output: one for each of a few classes, otherwise one."""
    values = [each.decode("utf-8", "replace") if isinstance(each, bytes) else each for each in unpack(tensor)]
    if len(tensor.shape) < 2:
        return [(tensor.name, [_shown(value) for value in values])]
    n_rows = tensor.n_rows
    width = len(values) // n_rows if n_rows else 0
    rows = [values[row * width : (row + 1) * width] for row in range(n_rows)]
    if len(tensor.shape) != 2 or width != len(labels):
        return [(tensor.name, [_row(row, range(width)) for row in rows])]
    if width > 2 * N_SHOWN:
        return [(tensor.name, [_row(row, labels) for row in rows])]
    return [(f"{tensor.name}_{label}", [_shown(row[place]) for row in rows]) for place, label in enumerate(labels)]


def _row(values: Sequence[Any], names: Sequence[object]) -> str:
    if len(values) <= 2 * N_SHOWN or isinstance(values[0], str):
        return " ".join(map(_shown, values))
    largest = sorted(range(len(values)), key=lambda index: values[index], reverse=True)[:N_SHOWN]
    return " ".join(f"{_shown(values[index])} [{names[index]}]" for index in largest) + f" … of {len(values)}"


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
