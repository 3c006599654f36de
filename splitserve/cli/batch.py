"""``splitserve batch``: files and tables in, answers out. Progress goes to stderr; stdout has the summary."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from splitserve.checks.examination import Allowed
    from splitserve.scoring.engines.processes import StartedEarly

INTERRUPTED = 130


class Arguments(msgspec.Struct, frozen=True, kw_only=True):
    """The command's arguments as they are typed."""

    model: str
    input: str
    output: str
    repository: str
    map: list[str]
    keep: list[str]
    to: str
    limit: int | None
    sample: str
    max_errors: str
    encoding: str
    delimiter: str
    engine: str
    url: str
    workers: int
    resume: bool
    overwrite: bool
    escape_formulas: bool
    dry_run: bool
    as_json: bool
    signature_key: str


def run(arguments: Arguments, allowed: Allowed) -> int:
    """Score, and print the summary; the exit status."""
    from splitserve.scoring.engines.processes import StartedEarly, n_needed, n_of_machine

    is_local = arguments.engine == "local" and not arguments.dry_run and arguments.workers >= 0
    try:
        # Workers import what they need while this process does.
        with StartedEarly(n_needed(arguments.input, n_of_machine(arguments.workers)) if is_local else 0) as started:
            return _run(arguments, allowed, started)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return INTERRUPTED


def _run(arguments: Arguments, allowed: Allowed, started: StartedEarly) -> int:
    try:
        from splitserve.scoring.engines.local import LocalEngine
        from splitserve.scoring.errors import ScoringError
        from splitserve.scoring.planning import parse_mapping
        from splitserve.scoring.runs import ScoringOptions, n_workers, plan
        from splitserve.scoring.runs import run as run_plan
    except ModuleNotFoundError as error:
        print(f'batch scoring needs more packages ({error.name}): pip install "splitserve[batch]"', file=sys.stderr)
        return 1
    try:
        options = ScoringOptions(
            repository=arguments.repository,
            mapping=parse_mapping(arguments.map),
            keep=tuple(name for text in arguments.keep for name in text.split(",") if name),
            to=arguments.to,
            limit=arguments.limit,
            sample=_share(arguments.sample),
            max_errors=arguments.max_errors,
            encoding=arguments.encoding,
            delimiter={"\\t": "\t", "tab": "\t"}.get(arguments.delimiter, arguments.delimiter),
            engine=arguments.engine,
            url=arguments.url,
            workers=arguments.workers,
            resume=arguments.resume,
            overwrite=arguments.overwrite,
            escape_formulas=arguments.escape_formulas,
            allowed=allowed,
            signature_key=arguments.signature_key,
        )
        planned = plan(arguments.model, arguments.input, arguments.output, options)
        if arguments.dry_run:
            from splitserve.scoring.estimate import dry_run

            found = dry_run(planned, options)
            print(_json(found) if arguments.as_json else found)
            return 0
        engine = LocalEngine(n_workers(options), started) if options.engine == "local" else None
        summary = run_plan(planned, options, engine=engine, shows_progress=True)
    except ScoringError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    print(_json(summary) if arguments.as_json else summary)
    if summary.exit_status:
        print(f"too many rows failed: {summary.errors} of {summary.rows}; --max-errors is {options.max_errors}", file=sys.stderr)
    return summary.exit_status


def _json(struct: msgspec.Struct) -> str:
    return msgspec.json.format(msgspec.json.encode(struct), indent=2).decode()


def _share(text: str) -> float:
    """``0.01`` or ``1%``; 0 for what is neither, which the run refuses."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)(%?)", text)
    return float(match[1]) / (100 if match[2] else 1) if match else 0.0
