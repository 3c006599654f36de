"""``python -m training run tables``, ``status``, ``show RUN``: the example pipelines, run in place."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from splitserve.pipeline.commands import main
from splitserve.pipeline.templates.tables.pipeline import PIPELINE as TABLES

STORE = Path(__file__).resolve().parents[1] / "training-store"

if __name__ == "__main__":
    sys.exit(main({"tables": replace(TABLES, store=STORE)}))
