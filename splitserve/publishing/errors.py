"""The errors of publishing."""

from __future__ import annotations


class PublishError(ValueError):
    """Nothing was published; the message says what is wrong and what to do."""


class NotConvertible(ValueError):
    """An estimator cannot be converted to ONNX, or not with these parameters; the message says why and what works instead."""
