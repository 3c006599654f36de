"""``splitserve infer``: rows from a file to a running system, the answer as a table, JSON or CSV."""

from __future__ import annotations

import codecs
import csv
import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from splitserve.cli.connection import client
from splitserve.cli.tables import print_table
from splitserve.errors import InvalidInput, SplitserveError
from splitserve.oip.classification import labels_of
from splitserve.oip.input_columns import input_columns
from splitserve.oip.messages import ModelMetadata
from splitserve.oip.rest import decode_json, decode_request
from splitserve.oip.v1 import decode_request as decode_v1
from splitserve.oip.v1 import from_instances
from splitserve.tensors import DATATYPES, Tensor, unpack

if TYPE_CHECKING:
    from splitserve.client import Answer

Output = Literal["table", "json", "jsonl", "csv"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
N_SHOWN = 5
"""Of a long row of numbers, this many are shown: the largest, with their classes or indices."""

MISSING = frozenset(
    (
        "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA", "NULL",
        "NaN", "None", "n/a", "nan", "null",
    )
)  # fmt: skip
"""Cells that are missing values, in text and in numbers: those of ``pandas.read_csv``."""

_MARKS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def run(
    model: str,
    file: Path | None,
    *,
    rows: str | None,
    url: str,
    version: str,
    timeout_s: float,
    output: Output = "table",
    encoding: str = "",
    has_header: bool = True,
) -> int:
    """Print a row for each row sent; 1 and the reason if that fails."""
    if (file is None) == (rows is None):
        print("expected a file or --rows, got both or neither", file=sys.stderr)
        return 2
    try:
        read = reader(file, rows, encoding=encoding, has_header=has_header)
        with client(url, timeout_s=timeout_s) as connection:
            metadata = connection.metadata(model, version)
            answer = connection.infer(model, arrays_of(read(metadata), metadata), version=version)
        print_answer(answer, metadata, output)
    except (SplitserveError, OSError, LookupError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def arrays_of(given: list[Any] | dict[str, Any], metadata: ModelMetadata) -> dict[str, Any]:
    """The inputs of a request, from what `reader` has read."""
    from splitserve.arrays import to_array

    tensors = [*given.values()] if isinstance(given, dict) else from_instances(given, metadata).inputs
    return {tensor.name: to_array(tensor) for tensor in tensors}


def print_answer(answer: Answer, metadata: ModelMetadata, output: Output = "table") -> None:
    """Print an answer; a table names the model and the version that answered, and has the labels of that version."""
    from splitserve.arrays import from_array

    match output:
        case "json":
            print(json.dumps(answer.to_records(), ensure_ascii=False))
        case "jsonl":
            for record in answer.to_records():
                print(json.dumps(record, ensure_ascii=False))
        case "csv":
            records = answer.to_records()
            writer = csv.DictWriter(sys.stdout, list(records[0]) if records else list(answer), lineterminator="\n")
            writer.writeheader()
            writer.writerows(records)
        case _:
            print(f"{answer.model} {answer.version}")
            known = (
                msgspec.structs.replace(metadata, properties={"labels": json.dumps(answer.labels)}) if answer.labels else metadata
            )
            print_outputs([from_array(name, array) for name, array in answer.items()], known)


def print_outputs(outputs: Sequence[Tensor], metadata: ModelMetadata) -> None:
    """Print the outputs of an answer as a table, with the labels that the model's metadata has."""
    columns = [column for tensor in outputs for column in _columns(tensor, labels_of(metadata, tensor.name))]
    print_table([name for name, _ in columns], zip(*(cells for _, cells in columns), strict=True))


def reader(
    file: Path | None, rows: str | None, *, encoding: str = "", has_header: bool = True
) -> Callable[[ModelMetadata], list[Any] | dict[str, Any]]:
    """A function from the model's metadata to the instances in the input, or to tensors by name (a V2 body)."""
    if rows is not None:
        return lambda metadata: _from_option(rows, metadata)
    assert file is not None, "run checks it"
    if str(file) == "-":
        return lambda metadata: _from_stdin(sys.stdin.buffer.read(), metadata, encoding, has_header)
    if file.suffix.lower() in IMAGE_SUFFIXES:
        return lambda metadata: _from_image(file, metadata)
    if file.suffix.lower() == ".csv":
        return lambda metadata: _from_csv(file, file.read_bytes(), metadata, encoding, has_header)
    return lambda metadata: _from_json(file.read_bytes(), str(file), metadata)


def _from_option(rows: str, metadata: ModelMetadata) -> list[Any] | dict[str, Any]:
    """JSON on the command line, which may have been meant as the name of a file.

    Raises:
        InvalidInput: not JSON; says how a file is named.
    """
    try:
        return _from_json(rows.encode(), "--rows", metadata)
    except InvalidInput as error:
        if rows.lstrip()[:1] in ("[", "{"):
            raise
        raise InvalidInput(
            f"{error.message}; a file is an argument: {metadata.name} {rows.removeprefix('@')}, without --rows"
        ) from None


def _from_stdin(data: bytes, metadata: ModelMetadata, encoding: str, has_header: bool) -> list[Any] | dict[str, Any]:
    """JSON, which begins with a bracket or a brace, or CSV."""
    if data.removeprefix(codecs.BOM_UTF8).lstrip()[:1] in (b"[", b"{", b""):
        return _from_json(data, "standard input", metadata)
    return _from_csv(Path("standard input"), data, metadata, encoding, has_header)


def _from_image(file: Path, metadata: ModelMetadata) -> list[Any]:
    """Its bytes, or its pixels if the model takes those."""
    if len(metadata.inputs) == 1 and metadata.inputs[0].datatype != "BYTES":
        import numpy as np
        from PIL import Image

        return [np.asarray(Image.open(file)).tolist()]
    return [file.read_bytes()]


def _from_json(text: bytes, what: str, metadata: ModelMetadata) -> list[Any] | dict[str, Any]:
    """Instances: a list, one record, one a line, or in "instances"; or the tensors of a V2 body, or of V1 by column."""
    text = text.removeprefix(codecs.BOM_UTF8)
    try:
        content = decode_json(text, what=what)
    except InvalidInput:
        lines = [line for line in text.splitlines() if line.strip()]
        if len(lines) < 2:
            raise
        return [decode_json(line, what=f"{what}, line {number}") for number, line in enumerate(lines, 1)]
    names = {spec.name for spec in metadata.inputs}
    if isinstance(content, list):
        return content
    if isinstance(content, dict) and "instances" in content and "instances" not in names:
        if not isinstance(content["instances"], list):
            raise InvalidInput(f'{what}: "instances": expected a list of rows or records')
        return content["instances"]
    if isinstance(content, dict) and isinstance(content.get("inputs"), list) and "inputs" not in names:
        return {tensor.name: tensor for tensor in decode_request(metadata.name, "", text).inputs}
    if isinstance(content, dict) and content.keys() == {"inputs"} and "inputs" not in names:  # V1, by column
        return {tensor.name: tensor for tensor in decode_v1(text, metadata, "").request.inputs}
    if isinstance(content, dict):
        return [content]
    raise InvalidInput(f'{what}: expected a list of rows or records, a record, or an object with a list in "instances"')


def _from_csv(file: Path, data: bytes, metadata: ModelMetadata, encoding: str, has_header: bool) -> list[Any]:
    """Records by column name; columns without an input are omitted, missing values as pandas reads them."""
    header, lines = _cells(file, data, encoding, has_header)
    datatypes = {spec.name: spec.datatype for spec in metadata.inputs}
    only = metadata.inputs[0] if len(metadata.inputs) == 1 else None
    if only is not None and only.name not in (header or ()):  # one input that takes all columns
        places = _places(file, header, input_columns(metadata))
        return [
            [_value(cells[place], only.datatype, file, line) for place in places or range(len(cells))] for line, cells in lines
        ]
    if header is None:
        header = list(datatypes)
        lines = [(line, _checked(cells, len(header), file, line)) for line, cells in lines]
    if not datatypes.keys() & set(header):
        expected = ", ".join(f'"{name}"' for name in datatypes)
        raise InvalidInput(f"{file}: the first line names no input of the model, expected a header with {expected}")
    return [
        {name: _value(cell, datatypes[name], file, line) for name, cell in zip(header, cells, strict=True) if name in datatypes}
        for line, cells in lines
    ]


def _cells(file: Path, data: bytes, encoding: str, has_header: bool) -> tuple[list[str] | None, list[tuple[int, list[str]]]]:
    """The header, and the cells of each line with its number.

    Raises:
        InvalidInput: the text has another encoding, or a line another number of cells.
    """
    used = encoding or _MARKS.get(data[:2], "utf-8-sig")
    try:
        text = data.decode(used)
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{file}: byte {error.start} is not {used}: name its encoding, e.g. --encoding latin-1") from None
    parsed = csv.reader(io.StringIO(text, newline=""))
    lines = [(parsed.line_num, cells) for cells in parsed if cells]
    if not has_header:
        width = len(lines[0][1]) if lines else 0
        return None, [(line, _checked(cells, width, file, line)) for line, cells in lines]
    if not lines:
        raise InvalidInput(f"{file}: expected a header, got an empty file")
    header = lines[0][1]
    if header and all(_is_number(cell) for cell in header):
        raise InvalidInput(f"{file}: the first line has numbers, expected a header; --no-header reads it as a row")
    return header, [(line, _checked(cells, len(header), file, line)) for line, cells in lines[1:]]


def _checked(cells: list[str], width: int, file: Path, line: int) -> list[str]:
    if len(cells) != width:
        raise InvalidInput(f"{file}, line {line}: expected {width} cells, got {len(cells)}")
    return cells


def _places(file: Path, header: list[str] | None, columns: Sequence[str]) -> list[int] | None:
    """Where each column of the model is in the file; None: in the file's order."""
    if header is None or not columns:
        return None
    if missing := [name for name in columns if name not in header]:
        raise InvalidInput(f"{file}: the header lacks {', '.join(missing)}")
    return [header.index(name) for name in columns]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _value(cell: str, datatype: str, file: Path, line: int) -> Any:
    text = cell.strip()
    if text in MISSING:
        return None
    if datatype == "BYTES":
        return cell
    if datatype == "BOOL":
        return text.lower() in ("1", "true", "yes")
    try:
        if "_" in text:
            raise ValueError
        if DATATYPES[datatype].is_integer and text.lstrip("+-").isdecimal():
            return int(text)
        number = float(text)
    except ValueError:
        raise InvalidInput(f'{file}, line {line}: "{cell[:32]}" is not a number') from None
    return int(number) if DATATYPES[datatype].is_integer and number.is_integer() else number


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
