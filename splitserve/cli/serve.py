"""``splitserve serve``: becomes the service's own process."""

from __future__ import annotations

import os
import sys

MODULES = {
    "proxy": "proxy",
    "preprocess": "preprocess_service",
    "predict": "predict_service",
    "jobs": "jobs_service",
    "fused": "fused_service",
}
"""The module that ``python -m`` runs for each service. The library imports none of them."""


def run(service: str) -> None:
    """Replace this process."""
    os.execv(sys.executable, [sys.executable, "-m", MODULES[service]])
