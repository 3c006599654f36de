"""Files of one attempt over the artifact interface of an MLflow server, for a step in a container. Standard library only.

Source: MLflow's ``mlflow_artifacts.proto``: ``GET`` and ``PUT /api/2.0/mlflow-artifacts/artifacts/PATH``.
"""

from __future__ import annotations

import shutil
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from splitserve.pipeline.context import StepFailed
from splitserve.pipeline.digests import digest_of_file

_TIMEOUT_S = 60.0


class Exchange:
    """The files below a URL."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def read(self, path: str) -> bytes:
        """The bytes of a file.

        Raises:
            StepFailed: it cannot be read.
        """
        try:
            with urllib.request.urlopen(self._of(path), timeout=_TIMEOUT_S) as response:
                content: bytes = response.read()
                return content
        except OSError as error:
            raise StepFailed(f"{self._of(path)}: {error}") from error

    def fetch(self, digests: Mapping[str, str], folder: Path) -> None:
        """Copy files into a folder.

        Args:
            digests: SHA-256 by path.
            folder: gets them under their paths.

        Raises:
            StepFailed: one cannot be read, or has another digest.
        """
        for path, digest in digests.items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with urllib.request.urlopen(self._of(path), timeout=_TIMEOUT_S) as response, target.open("wb") as file:
                    shutil.copyfileobj(response, file)
            except OSError as error:
                raise StepFailed(f"{self._of(path)}: {error}") from error
            if (found := digest_of_file(target)) != digest:
                raise StepFailed(f"{path}: expected SHA-256 {digest}, got {found}")

    def send(self, path: str, file: Path) -> None:
        """Write a file.

        Raises:
            StepFailed: the server does not take it.
        """
        with file.open("rb") as content:
            request = urllib.request.Request(self._of(path), data=content, method="PUT")
            request.add_header("Content-Length", str(file.stat().st_size))
            request.add_header("Content-Type", "application/octet-stream")
            try:
                urllib.request.urlopen(request, timeout=_TIMEOUT_S).close()
            except OSError as error:
                raise StepFailed(f"{self._of(path)}: {error}") from error

    def _of(self, path: str) -> str:
        return f"{self._url}/{quote(path)}"
