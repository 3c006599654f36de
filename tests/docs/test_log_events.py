"""docs/logs.md is read from the code: log events are constant terms with fields."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from docs.log_events import Event, events


def written(folder: Path, source: str) -> list[Event]:
    package = folder / "service"
    package.mkdir(exist_ok=True)
    (package / "module.py").write_text(source)
    return events(folder, ["service"])


def test_an_event_is_listed_with_its_level_fields_and_comment(tmp_path: Path) -> None:
    """The comment directly above the call is the event's meaning."""
    found = written(tmp_path, '# It is\n# gone.\nlog.exception("peer unreachable", peer=name)\n')

    assert found == [Event("peer unreachable", "error", ("peer", "exception"), "service/module.py", "It is gone.")]


def test_arguments_of_standard_logging_are_fields(tmp_path: Path) -> None:
    """A module that is used without a service writes to standard logging."""
    found = written(tmp_path, 'logging.getLogger(__name__).warning("file rejected: %(file)s", {"file": path})\n')

    assert found == [Event("file rejected", "warning", ("file",), "service/module.py", "")]


@pytest.mark.parametrize("argument", ['f"lost {name}"', "event", '"lost %s", name', ""])
def test_an_event_that_is_not_constant_is_an_error(tmp_path: Path, argument: str) -> None:
    """The error names the place."""
    with pytest.raises(ValueError, match=r"service/module\.py:2: a log event must be a constant string"):
        written(tmp_path, f"\nself._log.info({argument})\n")


def test_a_library_line_with_named_arguments_is_an_event_with_fields() -> None:
    """Other lines of libraries are events as they are."""
    code = """if True:
        import logging
        from splitserve.server import logs
        logs.configure(level="info", format="json", service="proxy")
        logging.getLogger("library").warning("file rejected: %(file)s", {"file": "a.pem"})
        logging.getLogger("library").warning("%s lost", "peer")
    """

    lines = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.splitlines()

    first, second = map(json.loads, lines)
    assert (first["event"], first["file"], first["logger"]) == ("file rejected", "a.pem", "library")
    assert second["event"] == "peer lost"
