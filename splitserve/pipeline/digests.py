"""Digests: canonical JSON of plain data, bytes of files. Never times, sizes or inode numbers."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

FORMAT = 1
"""Of the digest of a step. A change of it makes every step run again."""


class NotPlainData(ValueError):
    """A value is not None, a boolean, an integer, a finite float, a string, or a list or dict of them."""


def canonical(value: Any) -> str:
    """JSON with sorted keys and without white space. 1, 1.0, true and "1" are different; so are 0.1 and "0.1".

    Floats are written as Python's shortest form that reads back as the same number, e.g. 1e-1 as 0.1.

    Raises:
        NotPlainData: the value, or one in it; numpy's scalars and tuples too, since they would read back as something else.
    """
    _check(value, "")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _check(value: Any, where: str) -> None:
    kind = type(value)
    if kind is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise NotPlainData(f"key {key!r}{where}: expected a string, got {type(key).__name__}")
            _check(item, f"{where} in {key!r}")
    elif kind is list:
        for index, item in enumerate(value):
            _check(item, f"{where} at {index}")
    elif kind is float:
        if not math.isfinite(value):
            raise NotPlainData(f"value{where}: expected a finite number, got {value}")
    elif value is not None and kind not in (bool, int, str):
        raise NotPlainData(f"value{where}: expected plain data (JSON's types), got {kind.__module__}.{kind.__qualname__}")


def digest_of(value: Any) -> str:
    """SHA-256 of the canonical JSON, in hexadecimal."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    """SHA-256 of the bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests_of_folder(folder: Path) -> dict[str, str]:
    """Digest of each file below a folder by its path in it, with ``/``, in order."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): digest_of_file(path) for path in files}
