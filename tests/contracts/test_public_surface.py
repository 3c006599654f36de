"""What users import: pinned, so that it changes on purpose."""

from __future__ import annotations

import inspect

import splitserve


def test_the_package_offers_these_names_and_no_others() -> None:
    """A name that is taken away, or slips in, is a change that users see."""
    assert sorted(splitserve.__all__) == [
        "Client",
        "PublishError",
        "Published",
        "publish",
        "publish_predictor",
        "publish_preprocessor",
    ]


def test_every_public_name_has_a_docstring() -> None:
    """With its arguments and errors, for functions."""
    for name in splitserve.__all__:
        documented = inspect.getdoc(getattr(splitserve, name))
        assert documented
        if inspect.isfunction(getattr(splitserve, name)):
            assert "Args:" in documented
            assert "Raises:" in documented


def test_an_unknown_name_is_an_attribute_error() -> None:
    """Names are looked up when they are used, and say so when they are not there."""
    assert not hasattr(splitserve, "nonsense")
