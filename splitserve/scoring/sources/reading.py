"""Each format's reader, in one place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from splitserve.scoring.sources import columnar, delimited, images, json_lines
from splitserve.scoring.sources.block import Block, Part, Reading

if TYPE_CHECKING:
    from splitserve.scoring.shards import ScoringJob


class Reader:
    """Reads parts of files; keeps what helps to read the next part."""

    def __init__(self) -> None:
        self._parquet = columnar.ParquetReader()

    def close(self) -> None:
        """Close what is open."""
        self._parquet.close()

    def read(self, job: ScoringJob, part: Part, reading: Reading) -> Iterator[Block]:
        """The rows of a part.

        Raises:
            ScoringError: it is damaged.
            OSError: it cannot be read.
        """
        path = job.files[part.file].path
        if job.input_format == "images":
            return images.read(job.input, [file.path for file in job.files], part, reading)
        if job.input_format == "parquet":
            return self._parquet(path, part, reading)
        if job.input_format == "csv":
            return delimited.read(path, part, reading)
        if job.input_format == "jsonl":
            return json_lines.read(path, part, reading)
        return columnar.read_arrow(path, part, reading)
