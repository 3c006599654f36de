"""A folder of pictures: one row a file, which is the model's only input as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from splitserve.scoring.sources.block import Block, Part, Reading, Unreadable
from splitserve.scoring.storage import storage_of

SUFFIXES = (".jpg", ".jpeg", ".png")
FILE = "file"
"""The column with the path of a picture, below the input's folder."""

SHARD_FILES = 512
BLOCK_FILES = 16
"""Pictures in one call: decoded, each may take hundreds of megabytes."""

MAX_FILE_BYTES = 64 * 1024**2


def plan(files: Sequence[str]) -> list[Part]:
    """Runs of files, which are numbered as rows are."""
    return [
        Part(0, start, min(start + SHARD_FILES, len(files)), start + 1, min(SHARD_FILES, len(files) - start))
        for start in range(0, len(files), SHARD_FILES)
    ]


def read(root: str, files: Sequence[str], part: Part, reading: Reading) -> Iterator[Block]:
    """The pictures of a part. One that cannot be read is an error of its row."""
    storage, name = storage_of(root), reading.bindings[0].input
    for start in range(part.start, part.start + part.n_rows, BLOCK_FILES):
        rows, shown, data, unreadable = [], [], [], []
        for place in range(start, min(start + BLOCK_FILES, part.start + part.n_rows)):
            path = files[place]
            below = path.removeprefix(root).lstrip("/")
            try:
                with storage.open(path) as file:
                    content = file.read(MAX_FILE_BYTES + 1)
            except OSError as error:
                unreadable.append(Unreadable(place + 1, below, f"cannot be read: {error.strerror or error}"))
                continue
            if len(content) > MAX_FILE_BYTES:
                unreadable.append(Unreadable(place + 1, below, f"more than {MAX_FILE_BYTES} bytes, which is the limit"))
                continue
            rows.append(place + 1)
            shown.append(below)
            data.append(content)

        def original(place: int, shown: Sequence[str] = shown) -> dict[str, Any]:
            return {FILE: shown[place]}

        kept = {FILE: pa.array(shown, pa.string())} if FILE in reading.kept else {}
        columns = {reading.bindings[0].columns[0]: pa.array(data, pa.binary())}
        yield Block(np.array(rows, np.int64), columns, kept, original, {}, tuple(unreadable))

    assert name, "images are the model's only input"
