"""Parts of the library whose packages are not installed say how to install them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import splitserve
from splitserve.client import Answer
from splitserve.testing import serve


def _answer() -> Answer:
    return Answer({"label": np.array([1])}, model="m", version="1")


def _serve() -> None:
    with serve(object(), [[1.0]]):
        pass


PARTS: dict[str, tuple[Callable[[], Any], str, str, str]] = {
    "a frame": (lambda: _answer().to_frame(), "pandas", "to_frame()", "pandas"),
    "a frame of polars": (lambda: _answer().to_polars(), "polars", "to_polars()", "polars"),
    "a table of Arrow": (lambda: _answer().to_arrow(), "pyarrow", "to_arrow()", "pyarrow"),
    "publishing": (lambda: splitserve.publish, "splitserve.publishing", "splitserve.publish", '"splitserve[publish]"'),
    "scoring": (lambda: splitserve.score, "splitserve.scoring", "splitserve.score", '"splitserve[batch]"'),
    "serving": (
        _serve, "splitserve.publishing", "splitserve.testing.serve", '"splitserve[publish,proxy,preprocess,predict]"',
    ),
}  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_what_is_not_installed_is_named_with_the_way_to_install_it(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """It is still an error of imports, with the package's name."""
    use, package, what, packages = PARTS[part]
    monkeypatch.delitem(sys.modules, "splitserve.client.frames", raising=False)
    monkeypatch.setitem(sys.modules, package, None)

    with pytest.raises(ModuleNotFoundError) as raised:
        use()

    assert str(raised.value) == f"{what} needs more packages ({package}): pip install {packages}"
    assert raised.value.name == package
