"""The command ``splitserve``, in the process of a test."""

from __future__ import annotations

from functools import cache

import typer.testing
from typer.testing import CliRunner, Result

from splitserve.cli import app

typer.testing._get_command = cache(typer.testing._get_command)  # it builds all commands anew for each call, which takes longest


def run_command(*arguments: object) -> Result:
    """What ``splitserve ARGUMENTS`` prints, and its exit code."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])
