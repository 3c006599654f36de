"""``python -m splitserve``: the command ``splitserve``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command, or say what is missing."""
    try:
        from splitserve.cli import main as command
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        sys.exit('the commands require more packages: pip install "splitserve[cli]"')
    command()


if __name__ == "__main__":
    main()
