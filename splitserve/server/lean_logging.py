"""Imports structlog without rich, which a service does not use: a tenth of its start. Import this before anything that logs.

structlog imports rich where it is installed, as it is with the command line, for its development renderer.
"""

from __future__ import annotations

import sys

if "structlog" not in sys.modules and "rich" not in sys.modules:
    sys.modules["rich"] = None  # type: ignore[assignment]  # Source: Python, "sys.modules": importing it fails
    try:
        import structlog  # noqa: F401
    finally:
        del sys.modules["rich"]
