"""Folders that many tests start from, e.g. with published models."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

MadeOnce = Callable[[Callable[[Path], object]], Path]


def made_once_in(new_folder: Callable[[], Path]) -> MadeOnce:
    """For the fixture ``made_once``: calls each function that fills a folder once, and returns that folder from then on."""

    @cache
    def made(fill: Callable[[Path], object]) -> Path:
        folder = new_folder()
        fill(folder)
        return folder

    return made
