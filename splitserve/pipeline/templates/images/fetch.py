"""Fetches a file by its digest."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from pathlib import Path

from splitserve.pipeline import StepFailed

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "splitserve-datasets"
TIMEOUT_S = 60.0


def fetch(url: str, sha256: str, cache: Path = CACHE) -> Path:
    """The file of a URL, kept in the cache under its digest. It is fetched twice at most.

    Raises:
        StepFailed: it cannot be fetched, or what comes has another digest; nothing is kept then.
    """
    kept = cache / sha256
    if kept.is_file() and _digest(kept) == sha256:
        return kept
    cache.mkdir(parents=True, exist_ok=True)
    temporary = cache / f"{sha256}.{os.getpid()}.tmp"
    problem = ""
    try:
        for _ in range(2):
            problem = _download(url, temporary)
            if not problem and (found := _digest(temporary)) == sha256:
                temporary.replace(kept)
                return kept
            problem = problem or f"expected SHA-256 {sha256}, got {found}, of {temporary.stat().st_size} bytes"
    finally:
        temporary.unlink(missing_ok=True)
    raise StepFailed(f"{url}: {problem}")


def _download(url: str, target: Path) -> str:
    """Why it failed; "" if it did not."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response, target.open("wb") as file:
            expected = response.headers.get("Content-Length")
            while block := response.read(1 << 20):
                file.write(block)
    except (OSError, ValueError) as error:
        return str(error)
    size = target.stat().st_size
    return f"expected {expected} bytes, got {size}" if expected and int(expected) != size else ""


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
