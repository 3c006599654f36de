"""What users import: pinned, so that it changes on purpose."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import splitserve
from splitserve.client.jobs import AsyncJob, Job


def test_the_package_offers_these_names_and_no_others() -> None:
    """A name that is taken away, or slips in, is a change that users see."""
    assert splitserve.__all__ == [
        "TLS",
        "Answer",
        "AsyncClient",
        "Client",
        "PublishError",
        "Published",
        "publish",
        "publish_predictor",
        "publish_preprocessor",
        "release",
        "rollback",
        "score",
        "score_batches",
        "withdraw",
    ]


def test_every_public_name_has_a_docstring() -> None:
    """With its arguments and errors, for functions."""
    for name in splitserve.__all__:
        documented = inspect.getdoc(getattr(splitserve, name))
        assert documented
        if inspect.isfunction(getattr(splitserve, name)):
            assert "Args:" in documented
            assert "Raises:" in documented


@pytest.mark.parametrize("kind", [splitserve.Client, splitserve.AsyncClient, splitserve.Answer, Job, AsyncJob])
def test_every_public_method_shows_how_it_is_called(kind: type) -> None:
    """Of what applications hold in their hands; special methods and what forks call are not theirs to call."""
    methods = {name: each for name, each in vars(kind).items() if inspect.isfunction(each) and not name.startswith("_")}
    assert methods

    assert [name for name, each in methods.items() if name != "forked" and "Example::" not in (each.__doc__ or "")] == []


def test_an_unknown_name_is_an_attribute_error() -> None:
    """Names are imported when they are used; an unknown one raises AttributeError."""
    assert not hasattr(splitserve, "nonsense")


LIGHT = """
import sys
from splitserve import {name}
{use}
heavy = {{name.partition(".")[0] for name in sys.modules}} & {{{heavy}}}
assert not heavy, heavy
assert not any(name.startswith("splitserve.server") for name in sys.modules)
"""


@pytest.mark.parametrize(
    ("name", "use", "heavy"),
    [
        ("Client", "", "'grpc', 'httpx', 'pandas', 'rich', 'sklearn', 'onnxruntime'"),
        ("AsyncClient", "", "'grpc', 'httpx', 'pandas', 'rich', 'sklearn', 'onnxruntime'"),
        ("Client", "Client('http://127.0.0.1:1').close()", "'grpc', 'pandas', 'sklearn', 'onnxruntime'"),
        ("Client", "Client('127.0.0.1:1').close()", "'httpx', 'pandas', 'rich', 'sklearn', 'onnxruntime'"),
        ("publish", "", "'grpc', 'httpx'"),
    ],
)
@pytest.mark.heavy
def test_a_name_imports_only_what_it_needs(name: str, use: str, heavy: str) -> None:
    """The client no publishing and no server, and of the transports only the one that the URL names."""
    program = LIGHT.format(name=name, use=use, heavy=heavy)

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)

    assert (done.returncode, done.stderr) == (0, "")
