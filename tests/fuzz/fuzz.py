"""``python -m tests.fuzz.fuzz TARGET [libFuzzer's arguments]``: atheris on one of `decoders.DECODERS`. See ``make fuzz``."""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["splitserve"]):
    from tests.fuzz.decoders import DECODERS


def main() -> None:
    name, *arguments = sys.argv[1:]
    corpus = Path(__file__).parent / "corpus" / name
    atheris.Setup([sys.argv[0], str(corpus), *arguments], DECODERS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
