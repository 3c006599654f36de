"""``run``, ``status`` and ``show`` of one pipeline, or of several by name."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from splitserve.pipeline.context import RecordError, StepFailed, error_message
from splitserve.pipeline.declaration import DeclarationError, TrainingPipeline
from splitserve.pipeline.index import REUSED, RunState, StepState
from splitserve.pipeline.runner import RunFailed, Runner
from splitserve.pipeline.sources import SourceError


def main(pipelines: TrainingPipeline | Mapping[str, TrainingPipeline], arguments: Sequence[str] | None = None) -> int:
    """Run a command line; 1 if a step failed, 2 if the request is invalid, 130 if it was interrupted."""
    parsed = _parser(pipelines).parse_args(arguments)
    pipeline = pipelines if isinstance(pipelines, TrainingPipeline) else pipelines[parsed.pipeline]
    try:
        return int(parsed.command(pipeline, parsed))
    except (RunFailed, RecordError, OSError) as error:  # OSError: a full disk, a store that cannot be written
        print(error_message(error), file=sys.stderr)
        return 1
    except (DeclarationError, SourceError, StepFailed) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130


def _parser(pipelines: TrainingPipeline | Mapping[str, TrainingPipeline]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {Path(sys.argv[0]).parent.name}")
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="run what has not finished, or has changed")
    status = commands.add_parser("status", help="what a run would do, and the last runs")
    show = commands.add_parser("show", help="a run: its steps, metrics and outputs")
    for command, function in ((run, _run), (status, _status), (show, _show)):
        command.set_defaults(command=function)
    if not isinstance(pipelines, TrainingPipeline):
        run.add_argument("pipeline", choices=sorted(pipelines))
        for command in (status, show):
            command.add_argument("--pipeline", choices=sorted(pipelines), default=next(iter(pipelines)))
    show.add_argument("run", help="its id, or the first characters of it")
    run.add_argument("--from", dest="first", default="", metavar="STEP", help="run this step and all that depend on it again")
    run.add_argument("--until", default="", metavar="STEP", help="the last step to run")
    for command in (run, status):
        command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter; JSON, else text")
        command.add_argument("--containers", action="store_true", help="each step in an image of its own; needs docker")
    return parser


def parameter(text: str) -> tuple[str, Any]:
    """``seed=1`` -> ``("seed", 1)``; a value that is not JSON is text.

    Raises:
        DeclarationError: there is no ``=``.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise DeclarationError(f"--set {text}: expected NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _runner(pipeline: TrainingPipeline, parsed: argparse.Namespace) -> Runner:
    chosen = pipeline.container_parameters if parsed.containers else {}
    return Runner(pipeline.with_parameters({**chosen, **dict(map(parameter, parsed.set))}), in_containers=parsed.containers)


def _run(pipeline: TrainingPipeline, parsed: argparse.Namespace) -> int:
    began = time.monotonic()
    runner = _runner(pipeline, parsed)
    run = runner.run(first=parsed.first, until=parsed.until)
    if run is None:
        print("nothing to do: every step has finished with these inputs, parameters and sources")
        states = runner.states()
        _print_steps(states)
    else:
        _print_steps(run.steps)
        print(f"run {run.id} in {time.monotonic() - began:.1f} s; record: {runner.record.uri}")
        print(f"report: {runner.report(run.id)}")
        states = runner.states()
    _print_models(runner, states)
    return 0


def _print_models(runner: Runner, states: Sequence[StepState]) -> None:
    """How to serve what was built."""
    for state in states:
        found = runner.index.finished(state.step, state.digest) if state.digest else None
        if found is not None and any(path.startswith("models/") for path in found.outputs):
            print(f"serve it: splitserve up --repository {found.folder}/models")


def _status(pipeline: TrainingPipeline, parsed: argparse.Namespace) -> int:
    runner = _runner(pipeline, parsed)
    with ExitStack() as stack:
        is_closing = bool(runner.index.open_runs()) and not runner.index.is_running()
        if is_closing:
            stack.enter_context(runner.index.locked())
            runner.close_dead()
        _print_steps(runner.states())
        for run in runner.index.runs()[-5:]:
            steps = ", ".join(f"{step.step} {step.state}" for step in run.steps)
            print(f"{run.started_at}  {run.id}  {run.state}: {steps}", flush=True)
        if is_closing:
            try:
                runner.record_ends()
            except RecordError as error:
                print(f"{error}; the next command records how earlier runs have ended", file=sys.stderr)
    return 0


def _show(pipeline: TrainingPipeline, parsed: argparse.Namespace) -> int:
    runner = Runner(pipeline)
    found = [run for run in runner.index.runs() if run.id.startswith(parsed.run)]
    if len(found) != 1:
        raise DeclarationError(
            f"run {parsed.run}: expected one run of {pipeline.name} whose id begins with it, got {len(found)} in {runner.store}; "
            "`status` lists them"
        )
    run: RunState = found[0]
    print(f"run {run.id} of {run.pipeline}, {run.state}, started {run.started_at} by process {run.pid} on {run.host}")
    print("parameters: " + ", ".join(f"{name}={json.dumps(value)}" for name, value in run.parameters.items()))
    _print_steps(run.steps)
    for step in run.steps:
        finished = runner.index.finished(step.step, step.digest)
        if finished is not None:
            print(f"\n{step.step} {finished.digest[:16]}: {finished.folder}")
            for name, value in finished.last_metrics().items():
                print(f"  {name}: {value:.6g}")
            for path, digest in finished.outputs.items():
                print(f"  {digest[:16]}  {path}")
    return 0


def _print_steps(states: Sequence[StepState]) -> None:
    print(f"{'step':<12}{'state':<13}{'seconds':>8}  {'digest':<14}note")
    for state in states:
        seconds = f"{state.seconds:.1f}" if state.seconds else "-"
        note = state.why if state.state != REUSED else f"from run {state.run_id[:12]}"
        print(f"{state.step:<12}{state.state:<13}{seconds:>8}  {state.digest[:12]:<14}{note}".rstrip())
