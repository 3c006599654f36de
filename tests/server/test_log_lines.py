"""What each line of the log has."""

from __future__ import annotations

import io
import logging
import threading
from typing import Any

import msgspec
import pytest
import structlog

from splitserve.server import logs


def test_lines_of_every_thread_name_their_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new thread has none of the variables of the context that started it."""
    configured: dict[str, Any] = {}
    monkeypatch.setattr(structlog, "configure", lambda **settings: configured.update(settings))
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    for owner, names in ((logs.LogLevel, ("current", "_least")), (logs.RequestLog, ("wanted",))):
        for name in names:
            monkeypatch.setattr(owner, name, getattr(owner, name))
    logs.configure(level="info", format="json", service="predict")
    written = io.StringIO()
    logger = structlog.wrap_logger(structlog.WriteLogger(written), processors=configured["processors"])

    thread = threading.Thread(target=logger.info, args=("spans dropped",))
    thread.start()
    thread.join()

    assert msgspec.json.decode(written.getvalue())["service"] == "predict"
