"""``splitserve pipeline new``."""

from __future__ import annotations

import sys
from pathlib import Path

from splitserve.pipeline.new import copy_template


def run(folder: Path, template: str) -> None:
    """Copy, and say how to go on."""
    try:
        copy_template(folder, template)
    except ValueError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    where = folder.resolve()
    print(f"created {where}: data and parameters are in pipeline.py, the model in model.py\n\ncd {where.parent}")
    print(f"python -m {where.name} run\npython -m {where.name} status")
