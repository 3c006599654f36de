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


ADMIN_OFFSETS = {"proxy": 0, "preprocess": 10, "predict": 20, "jobs": 30}
"""How far above that of the proxy, or of the fused service, the port of each admin listener is."""


def run(service: str) -> None:
    """Replace this process."""
    os.execv(sys.executable, [sys.executable, "-m", MODULES[service]])
