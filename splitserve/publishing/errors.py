"""The error of publishing."""

from __future__ import annotations


class PublishError(ValueError):
    """Nothing was published; the message says what is wrong and what to do."""
