"""Files with estimators are read, or refused with what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import skops.io
from sklearn.base import BaseEstimator

from splitserve import PublishError
from splitserve.publishing.estimator_files import read_pickle, read_skops


class Own(BaseEstimator):
    """A class that nobody trusts."""


def test_types_that_are_not_allowed_are_named_with_the_option(tmp_path: Path) -> None:
    """Not with the setting of a service."""
    skops.io.dump(Own(), path := tmp_path / "own.skops")

    with pytest.raises(
        PublishError, match="^own.skops: holds types that are not allowed: .*Own; name their modules with --trusted-"
    ):
        read_skops(path, path.name, ())

    assert isinstance(read_skops(path, path.name, [__name__]), Own)


@pytest.mark.parametrize("read", [lambda path: read_skops(path, "file", ()), lambda path: read_pickle(path, "file")])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, read: Any) -> None:
    (tmp_path / "damaged").write_bytes(b"no archive")

    with pytest.raises(PublishError, match="^file: No such file or directory$"):
        read(tmp_path / "missing")
    with pytest.raises(PublishError, match="^file: (not a skops file|damaged cannot be read)"):
        read(tmp_path / "damaged")
