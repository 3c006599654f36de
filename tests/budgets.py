"""How much tests that look for counterexamples may spend: in CI all that they are given, elsewhere a fifth of it."""

from __future__ import annotations

import os

IS_CI = bool(os.environ.get("CI"))


PAUSE_S = 0.0 if IS_CI else 0.005
"""Between two requests of a caller under load: what is published meanwhile needs the CPU, too."""


def examples(n: int) -> int:
    """Examples of a property, or repetitions of what might go wrong at any moment, ``n`` in CI."""
    return n if IS_CI else max(n // 5, 5)


def seconds(n: int) -> int:
    """Time for a search that ends by the clock, ``n`` s in CI."""
    return n if IS_CI else max(n // 5, 2)
