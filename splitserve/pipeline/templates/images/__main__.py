"""``python -m THIS_FOLDER run | status | show RUN``, from the folder above."""

from __future__ import annotations

import sys

from splitserve.pipeline.commands import main

from .pipeline import PIPELINE

if __name__ == "__main__":
    sys.exit(main(PIPELINE))
