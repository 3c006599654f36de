"""Runs a pipeline: reuses what is finished and unchanged, runs the rest, and records it.

1. The store is locked; runs of dead runners are closed.
2. For each step in order: its digest, over all that it depends on, the digests of its inputs' bytes included.
3. A step that has finished with this digest, and whose outputs have the recorded bytes, is reused.
4. Any other runs in a process or a container of its own, on copies of its inputs.
5. Its outputs are uploaded, its MLflow run is ended, and last its mark is written to the index. Before that, it has not finished.
6. A step that fails ends the run; nothing after it runs.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitserve.pipeline.attempt import Attempt
from splitserve.pipeline.containers import ArtifactServer, Container, StepImages, runs_in_container
from splitserve.pipeline.context import RecordError, StepFailed, error_message, first_of, read_metrics, write_durably
from splitserve.pipeline.declaration import DeclarationError, Step, TrainingPipeline
from splitserve.pipeline.dependencies import Dependencies, changes, inputs_of
from splitserve.pipeline.digests import digest_of, digests_of_folder
from splitserve.pipeline.index import (
    FAILED,
    FINISHED,
    INTERRUPTED,
    PENDING,
    REUSED,
    RUNNING,
    Finished,
    Index,
    RunState,
    StepState,
    now,
)
from splitserve.pipeline.report import render
from splitserve.pipeline.sources import SourceError

if TYPE_CHECKING:
    from splitserve.pipeline.record import Record


class RunFailed(Exception):
    """A step failed; the message names it and says why."""


class Runner:
    """Runs one pipeline, and says what a run would do.

    Args:
        pipeline: what is run.
        in_containers: whether each step has an image of its own.
    """

    def __init__(self, pipeline: TrainingPipeline, *, in_containers: bool = False) -> None:
        self.pipeline = pipeline
        self.store = pipeline.store_folder()
        self.index = Index(self.store, pipeline.name)
        self._dependencies = Dependencies(pipeline, self.store / "index" / "imports.json")
        self._attempts = self.store / "attempts"
        self._record: Record | None = None
        self._images = StepImages(pipeline, self._dependencies.modules_of) if in_containers else None
        self._server: ArtifactServer | None = None

    def states(self) -> list[StepState]:
        """What a run would do with each step: reuse it, run it and why, or wait for an earlier one."""
        states, finished = [], dict[str, Finished]()
        for step in self.pipeline.steps:
            if missing := [name for name in step.upstream() if name not in finished]:
                states.append(StepState(step.name, PENDING, why=f"waits for {', '.join(missing)}"))
                continue
            depends_on = self._dependencies.of(step, finished)
            if self._images is not None and runs_in_container(step):
                depends_on["image"] = self._images.find(step)
                if not depends_on["image"]:
                    states.append(StepState(step.name, PENDING, why="its image has not been built"))
                    continue
            state, found = self._state(step, depends_on)
            states.append(state)
            if found is not None:
                finished[step.name] = found
        return states

    def _state(self, step: Step, depends_on: dict[str, Any], *, is_forced: bool = False) -> tuple[StepState, Finished | None]:
        digest = digest_of(depends_on)
        found = self.index.finished(step.name, digest)
        if found is not None and not is_forced and not (problem := found.problem()):
            return StepState(step.name, FINISHED, digest, found.run_id, found.seconds), found
        if is_forced:
            why = "asked for by --from"
        elif found is not None:
            why = problem
        elif (last := self.index.last(step.name)) is None:
            why = "has never finished"
        else:
            why = f"changed: {first_of(changes(last.depends_on, depends_on)) or 'back to what finished before, and was removed'}"
        return StepState(step.name, PENDING, digest, why=why), None

    def run(self, *, first: str = "", until: str = "") -> RunState | None:
        """Run what is not finished.

        Args:
            first: this step, and all that depend on it, run again in any case.
            until: the last step to run; all by default.

        Returns:
            The run; None if there was nothing to do.

        Raises:
            RunFailed: a step failed.
            DeclarationError: there is no such step.
        """
        forced = self._downstream(first) if first else set[str]()
        steps = list(self.pipeline.steps)
        if until:
            steps = steps[: steps.index(self.pipeline.step(until)) + 1]
        with self.index.locked(), _sigterm_as_interrupt():
            shutil.rmtree(self._attempts, ignore_errors=True)  # of runners that were killed
            self.close_dead()
            self.record_ends()
            try:
                return self._run(steps, forced)
            finally:
                self._close_server()

    def _run(self, steps: list[Step], forced: set[str]) -> RunState | None:
        finished: dict[str, Finished] = {}
        reused: list[StepState] = []
        run: RunState | None = None
        try:
            for step in steps:
                depends_on = self._dependencies.of(step, finished)
                if self._images is not None and runs_in_container(step):
                    try:
                        depends_on["image"] = self._images.build(step)
                    except StepFailed as error:
                        raise self._failed_to_begin(run or self._begin(reused), step, str(error)) from error
                state, found = self._state(step, depends_on, is_forced=step.name in forced)
                if found is None and step.name not in forced:
                    state, found = self._finished_elsewhere(state)
                if found is not None:
                    finished[step.name] = found
                    state.state = REUSED
                    (run.steps if run else reused).append(state)
                    if run:
                        self._note_reuse(run, state)
                    continue
                if run is None:
                    run = self._begin(reused)
                run.steps.append(state)
                finished[step.name] = self._run_step(run, step, state, depends_on, finished)
        except (DeclarationError, SourceError, RecordError, OSError) as error:
            if run is not None:
                with suppress(RecordError, OSError):
                    self._end(run, FAILED, error_message(error))
            raise
        if run is not None:
            self._end(run, FINISHED)
            self._write_report(run)
        return run

    def _finished_elsewhere(self, state: StepState) -> tuple[StepState, Finished | None]:
        """The step as it has finished on another machine with the same tracking server; the state as it is if it has not."""
        found = self.record.fetch(state.step, state.digest) if os.environ.get("MLFLOW_TRACKING_URI") else None
        if found is None:
            return state, None
        self.index.finish(found)
        return StepState(state.step, FINISHED, found.digest, found.run_id, found.seconds), found

    def _failed_to_begin(self, run: RunState, step: Step, reason: str) -> RunFailed:
        """Of a step that has no digest yet: its image cannot be built."""
        state = StepState(step.name, RUNNING, run_id=self.record.start_step(step.name, "", parent=run.id))
        run.steps.append(state)
        return self._failed(run, state, reason, [])

    @property
    def record(self) -> Record:
        """MLflow; imported on first use."""
        if self._record is None:
            from splitserve.pipeline.record import Record

            self._record = Record(self.store, self.pipeline.name)
        return self._record

    def _begin(self, reused: list[StepState]) -> RunState:
        values = dict(self.pipeline.parameters)
        self.record.close_unknown()
        run_id = self.record.start(self.pipeline.name, values)
        run = RunState(run_id, self.pipeline.name, RUNNING, os.getpid(), socket.gethostname(), now(), values, is_recorded=False)
        self.index.write_run(run)
        for state in reused:
            run.steps.append(state)
            self._note_reuse(run, state)
        return run

    def _note_reuse(self, run: RunState, state: StepState) -> None:
        """A nested run that says whose outputs are used."""
        print(f"{state.step}: reused from run {state.run_id}", flush=True)
        self.record.end(self.record.start_step(state.step, state.digest, parent=run.id, reused=state.run_id), "FINISHED")

    def _run_step(
        self, run: RunState, step: Step, state: StepState, depends_on: dict[str, Any], finished: Mapping[str, Finished]
    ) -> Finished:
        print(f"{step.name}: running ({state.why})", flush=True)
        self.index.forget(step.name, state.digest)
        state.state = RUNNING
        state.run_id = self.record.start_step(step.name, state.digest, parent=run.id, parameters=depends_on["parameters"])
        self.index.write_run(run)
        scratch = self.index.scratch(step.name, state.digest)
        scratch.mkdir(parents=True, exist_ok=True)
        if not (scratch / "checkpoints").exists():
            (scratch / "metrics.jsonl").unlink(missing_ok=True)  # nothing to resume from: they are an earlier attempt's
        try:
            result = self._attempt(step, state, depends_on, finished, scratch)
            self.index.finish(result)
        except (StepFailed, OSError, RecordError) as error:
            raise self._failed(run, state, error_message(error), read_metrics(scratch / "metrics.jsonl")) from error
        except KeyboardInterrupt:
            with suppress(RecordError, OSError):  # the next command does what this one cannot
                self._end(run, INTERRUPTED, "interrupted by a signal")
            raise
        shutil.rmtree(scratch, ignore_errors=True)
        state.state = FINISHED
        self.index.write_run(run)
        print(f"{step.name}: finished in {state.seconds:.1f} s", flush=True)
        return result

    def _attempt(
        self, step: Step, state: StepState, depends_on: dict[str, Any], finished: Mapping[str, Finished], scratch: Path
    ) -> Finished:
        """Run the step's function, and record what it wrote."""
        began = time.monotonic()
        self._attempts.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._attempts, prefix=f"{step.name}-") as folder:
            container = self._container(depends_on["image"], folder) if depends_on["image"] else None
            outputs = Attempt(self.pipeline, step, Path(folder), scratch, container).run(
                inputs_of(step, finished), run_id=state.run_id, record=self.record
            )
            state.seconds = round(time.monotonic() - began, 2)
            result = Finished(
                step=step.name,
                digest=state.digest,
                depends_on=depends_on,
                run_id=state.run_id,
                folder="",
                outputs=digests_of_folder(outputs),
                metrics=read_metrics(scratch / "metrics.jsonl"),
                seconds=state.seconds,
                finished_at=now(),
            )
            result.folder = str(self.record.keep_outputs(state.run_id, outputs))
            if problem := result.problem():
                raise StepFailed(f"{problem}: the artifact store does not hold what was written")
            self.record.finish(state.run_id, result)
        return result

    def _container(self, image: str, folder: str) -> Container:
        """Where the attempt in that folder runs; MLflow's server is started by the first."""
        if self._server is None:
            self._server = ArtifactServer(self._attempts, self.store / "artifact-server.log")
        return Container(image, self._server.url(Path(folder).name))

    def _close_server(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    def _failed(self, run: RunState, state: StepState, reason: str, metrics: list[dict[str, Any]]) -> RunFailed:
        state.state, state.why = FAILED, reason
        with suppress(RecordError, OSError):  # it may be what failed; the next command does what this one cannot
            self._end(run, FAILED, f"step {state.step} failed")
            self.record.log_metrics(state.run_id, metrics)
            self._write_report(run)
        return RunFailed(f"step {state.step} failed: {reason}")

    def _end(self, run: RunState, state: str, why: str = "") -> None:
        """End a run here, then in MLflow."""
        try:
            self._end_here(run, state, why)
        finally:
            self._record_end(run)

    def _end_here(self, run: RunState, state: str, why: str) -> None:
        run.state, run.why = state, why
        for step in run.steps:
            if step.state == RUNNING:
                step.state, step.why = state, why
        self.index.write_run(run)

    def _record_end(self, run: RunState) -> None:
        self.record.close(run)
        run.is_recorded = True
        self.index.write_run(run)

    def report(self, run_id: str) -> Path:
        """Where the report of a run is."""
        return self.store / "reports" / f"{run_id}.html"

    def _write_report(self, run: RunState) -> None:
        """Beside the index, and as an artifact of the run."""
        found = {step.step: self.index.finished(step.step, step.digest) for step in run.steps}
        path = self.report(run.id)
        write_durably(path, render(run, {name: step for name, step in found.items() if step is not None}).encode())
        with suppress(RecordError):
            self.record.client.log_artifact(run.id, str(path))

    def close_dead(self) -> None:
        """End the runs that a dead runner left, here. The store must be locked."""
        for run in self.index.open_runs():
            if run.state == RUNNING:
                self._end_here(run, INTERRUPTED, f"its runner, process {run.pid} on {run.host}, is dead")

    def record_ends(self) -> None:
        """End in MLflow the runs that have ended here, and have not in its record. The store must be locked.

        Raises:
            RecordError: MLflow is away.
        """
        for run in self.index.open_runs():
            self._record_end(run)
            self._write_report(run)

    def _downstream(self, name: str) -> set[str]:
        reached = {self.pipeline.step(name).name}
        for step in self.pipeline.steps:
            if reached & set(step.upstream()):
                reached.add(step.name)
        return reached


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
