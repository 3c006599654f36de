"""Checks of a model repository in images of services: docker runs the image's own Python."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from splitserve.checks.across import Passed, Step, across
from splitserve.checks.examination import Allowed, Report, Trial

T = TypeVar("T")

_CONFINED = (
    "run", "--rm", "--interactive", "--network", "none", "--read-only", "--cap-drop", "ALL",
    "--security-opt", "no-new-privileges", "--tmpfs", "/tmp",  # noqa: S108 - the container's own
)  # fmt: skip
"""Bundles are untrusted: in an image they can only read the repository and print."""

_FOLDER = "/models"


class ImageError(Exception):
    """An image gave no report; the message says why."""


class Images:
    """Images with a model repository mounted read-only.

    Args:
        root: folder of the repository.
        allowed: what the services' settings allow.
        docker: the program that runs images.
    """

    def __init__(self, root: Path, allowed: Allowed, docker: str) -> None:
        self._mount = f"type=bind,source={root.resolve()},target={_FOLDER},readonly"
        self._allowed = msgspec.json.encode(allowed).decode()
        self._docker = docker

    def examine(self, image: str) -> Report:
        """Which bundles load there, and which releases answer as recorded, if both halves run there.

        Raises:
            ImageError: docker or the image is missing, or splitserve in it failed.
        """
        return self._run(image, Report, "examination", _FOLDER, self._allowed)

    def across(self, preprocess: Sequence[str], predict: Sequence[str]) -> dict[str, tuple[Trial, ...]]:
        """Run all releases across each image of preprocess with each of predict: trials by the name of the two.

        Raises:
            ImageError: as `examine`.
        """
        return across(self._take, preprocess, predict)

    def _take(self, image: str, step: Step, before: Sequence[Passed]) -> Sequence[Passed]:
        return self._run(image, list[Passed], "across", step, _FOLDER, self._allowed, given=msgspec.json.encode(before))

    def _run(self, image: str, kind: type[T], module: str, *arguments: str, given: bytes = b"") -> T:
        """What a program of `splitserve.checks` prints in an image."""
        inside = ["-m", f"splitserve.checks.{module}", *arguments]
        try:
            answer = subprocess.run(
                [self._docker, *_CONFINED, "--mount", self._mount, "--entrypoint", "python", image, *inside],
                input=given,
                capture_output=True,
            )
        except OSError as error:
            raise ImageError(f"{self._docker} cannot be run: {error.strerror}") from error
        if answer.returncode:
            reason = _error_in(answer.stderr.decode(errors="replace"))
            raise ImageError(f"{image}: {reason or f'exit status {answer.returncode}'}")
        try:
            return msgspec.json.decode(_last_line(answer.stdout.decode(errors="replace")), type=kind)
        except msgspec.DecodeError as error:
            raise ImageError(f"{image}: the report of its splitserve cannot be decoded: {error}") from error


def _error_in(text: str) -> str:
    """Docker's own error line, without the advice after it; else the last line from the container."""
    return next((line for line in text.splitlines() if line.startswith("docker: ")), "") or _last_line(text)


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")
