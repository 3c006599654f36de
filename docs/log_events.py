"""The log events of the services, read from the source: every call of a logger, its level and its fields.

An event is a constant string, so that an operator can search for it. A comment directly above the call says what it means.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGES = ("splitserve", "proxy", "preprocess_service", "predict_service", "jobs_service", "fused_service")

LEVELS = {"debug": "debug", "info": "info", "warning": "warning", "error": "error", "exception": "error", "critical": "critical"}
LOGGERS = ("log", "_log")
"""Names of variables and attributes that hold a logger."""
FACTORIES = ("get_logger", "getLogger")

REQUEST_LOG = "splitserve/server/logs.py"
REQUEST_LINES = ("log_request",)
"""What writes the line for a request; its first argument is the event."""
REQUEST_FIELDS = (
    "model", "version", "status", "duration_ms", "request_id", "rows", "bytes", "queue_ms", "compute_ms", "hop_ms", "encode_ms",
    "failed_stage", "trace_id",
)  # fmt: skip
REQUEST_MEANING = "A request was answered or failed (`LOG_REQUESTS` chooses which are logged)."


class Event(NamedTuple):
    """One call of a logger."""

    name: str
    level: str
    fields: tuple[str, ...]
    module: str
    meaning: str


def events(root: Path = ROOT, packages: Sequence[str] = PACKAGES) -> list[Event]:
    """Every log event of the packages, by name and module.

    Raises:
        ValueError: an event is not a constant string; the message names the file and the line.
    """
    paths = sorted(path for package in packages for path in (root / package).rglob("*.py"))
    return sorted({event for path in paths for event in _in_module(path, path.relative_to(root).as_posix())})


def _in_module(path: Path, module: str) -> Iterator[Event]:
    source = path.read_text()
    lines = source.splitlines()
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        if isinstance(call.func, ast.Attribute) and call.func.attr in LEVELS and _is_logger(call.func.value):
            if module == REQUEST_LOG and call.args and isinstance(call.args[0], ast.Name):
                continue  # the line for a request: its callers name the event
            name = _name(call, module).partition(": %(")[0]
            yield Event(name, LEVELS[call.func.attr], _fields(call), module, _comment_above(lines, call.lineno))
        elif _called(call.func) in REQUEST_LINES and module != REQUEST_LOG:
            yield Event(_name(call, module), "info", REQUEST_FIELDS, module, REQUEST_MEANING)


def _is_logger(node: ast.expr) -> bool:
    if isinstance(node, ast.Call):
        return _called(node.func) in FACTORIES
    return _called(node) in LOGGERS


def _called(node: ast.expr) -> str:
    """The last part of a dotted name."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _name(call: ast.Call, module: str) -> str:
    name = _text(call.args[0]) if call.args else ""
    has_positional_facts = len(call.args) > 1 and not isinstance(call.args[1], ast.Dict) and _called(call.func) in LEVELS
    if not name or has_positional_facts:
        raise ValueError(f"{module}:{call.lineno}: a log event must be a constant string, with its facts as keywords")
    return name


def _fields(call: ast.Call) -> tuple[str, ...]:
    """Keywords; of standard logging, the names of a dict of arguments."""
    arguments = call.args[1] if len(call.args) > 1 else None
    if isinstance(arguments, ast.Dict):
        return tuple(map(_text, arguments.keys))
    fields = tuple("exception" if keyword.arg == "exc_info" else keyword.arg or "…" for keyword in call.keywords)
    return (*fields, "exception") if _called(call.func) == "exception" else fields


def _text(node: ast.expr | None) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _comment_above(lines: Sequence[str], line: int) -> str:
    """The comment that ends on the line before, as one sentence."""
    begin = line - 1
    while begin and lines[begin - 1].lstrip().startswith("# "):
        begin -= 1
    return " ".join(text.strip().removeprefix("#").strip() for text in lines[begin : line - 1])
