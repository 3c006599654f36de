"""One attempt to run a step: copies of its inputs, its function in a process or container of its own, a folder of outputs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import splitserve
from splitserve.pipeline import containers
from splitserve.pipeline.containers import Container
from splitserve.pipeline.context import Call, Context, StepFailed
from splitserve.pipeline.declaration import Step, TrainingPipeline
from splitserve.pipeline.dependencies import file_of, locked_versions, root_of
from splitserve.pipeline.digests import digest_of, digest_of_file, digests_of_folder
from splitserve.pipeline.worker import CALL, WRITTEN

if TYPE_CHECKING:
    from splitserve.pipeline.record import Record


INTERRUPT_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Attempt:
    """``folder`` is removed after the attempt, ``scratch`` kept for the next one; ``container`` is where it runs, if in one."""

    pipeline: TrainingPipeline
    step: Step
    folder: Path
    scratch: Path
    container: Container | None = None

    def run(self, sources: Iterable[tuple[str, str, Path]], *, run_id: str, record: Record) -> Path:
        """Run the step's function on copies of its inputs.

        Args:
            sources: path, digest and file of each input.
            run_id: of its MLflow run.
            record: for a step that runs in this process.

        Returns:
            The folder of its outputs.

        Raises:
            StepFailed: it failed; the message is its own.
        """
        fetched = self._copy_inputs(sources)
        outputs = self.folder / "outputs"
        outputs.mkdir()
        files = {name: file_of(self.pipeline, self.step, name) for name in self.step.files}
        if self.step.runs_in_runner:
            call = self._call(self.folder, self.scratch, files)
            context = Context(call)
            context.record, context.run_id = record, run_id
            self._make(call, context)
        elif self.container is not None:
            self._run_in_container(self.container, files, fetched)
        else:
            path = self.folder / CALL
            path.write_text(json.dumps(asdict(self._call(self.folder, self.scratch, files))))
            self._wait_for(self._process(path), "process")
        return outputs

    def _copy_inputs(self, sources: Iterable[tuple[str, str, Path]]) -> dict[str, str]:
        """The digest of each by its path in the attempt's folder."""
        (self.folder / "inputs").mkdir()
        copied = {}
        for path, digest, file in sources:
            target = self.folder / "inputs" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
            if (found := digest_of_file(target)) != digest:
                raise StepFailed(
                    f"input {path}: expected SHA-256 {digest[:12]}…, got {found[:12]}…: {file} has changed since; run again"
                )
            copied[f"inputs/{path}"] = digest
        return copied

    def _call(self, folder: Path, scratch: Path, files: Mapping[str, Path], fetched: Mapping[str, str] | None = None) -> Call:
        """The call in which the attempt's folder and scratch are those."""
        step, pipeline = self.step, self.pipeline
        module, _, function = step.run.partition(":")
        return Call(
            step=step.name,
            module=pipeline.module_of(module),
            function=function,
            parameters={name: pipeline.parameters[name] for name in (*step.parameters, *step.files)},
            files={name: str(file) for name, file in files.items()},
            locked=locked_versions(pipeline.path(step.lock)) if step.lock else [],
            inputs=str(folder / "inputs"),
            outputs=str(folder / "outputs"),
            scratch=str(scratch),
            error=str(folder / "error"),
            project=f"splitserve-{digest_of(str(pipeline.store_folder()))[:12]}",
            fetched=dict(fetched or {}),
        )

    def _run_in_container(self, container: Container, files: Mapping[str, Path], fetched: dict[str, str]) -> None:
        """Its inputs, the files that it declares among them, are fetched by the container; what it sends is in ``outputs``."""
        inside = {}
        for name, file in files.items():
            path = f"files/{name}/{file.name}"
            (self.folder / path).parent.mkdir(parents=True)
            shutil.copyfile(file, self.folder / path)
            fetched[path] = digest_of_file(self.folder / path)
            inside[name] = containers.ATTEMPT / path
        call = self._call(containers.ATTEMPT, containers.SCRATCH, inside, fetched=fetched)
        (self.folder / CALL).write_text(json.dumps(asdict(call)))
        command = container.command(self.step, self.scratch)
        self._wait_for(_started(command, os.environ, self.folder), "container")
        if digests_of_folder(self.folder / "outputs") != json.loads((self.folder / WRITTEN).read_text()):
            raise StepFailed("what MLflow's server has kept is not what the step's container sent; run again")

    def _make(self, call: Call, context: Context) -> None:
        """In this process."""
        root = str(root_of(self.pipeline))
        if root not in sys.path:
            sys.path.insert(0, root)
        try:
            call.make(context)
        except (StepFailed, OSError):
            raise
        except Exception as error:
            raise StepFailed(f"{type(error).__name__}: {error}") from error

    def _process(self, call: Path) -> subprocess.Popen[bytes]:
        """The step's process, by the interpreter of its own environment if it has one."""
        python = str(self.pipeline.path(self.step.python)) if self.step.python else sys.executable
        if not Path(python).exists():
            raise StepFailed(f"{python} does not exist: the step has an environment of its own, with what is in {self.step.lock}")
        paths = [str(root_of(self.pipeline))]
        library = Path(splitserve.__file__).parents[1]
        if "site-packages" not in library.parts:
            paths.append(str(library))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "0"}
        return _started([python, "-m", "splitserve.pipeline.worker", str(call)], environment, self.pipeline.folder)

    def _wait_for(self, process: subprocess.Popen[bytes], what: str) -> None:
        """It ends when its standard input is closed, so with this process. If this one is interrupted, it may clean up before.

        Raises:
            StepFailed: it failed.
        """
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(INTERRUPT_TIMEOUT_S)
            raise
        finally:
            assert process.stdin is not None, "it is a pipe"
            process.stdin.close()
            process.wait()
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it has started and, being killed, not ended
        if code:
            error = self.folder / "error"
            number = -code if code < 0 else code - 128  # docker's exit codes, as a shell's, are above 128
            ended = f"was killed by signal {number}" if number > 0 else f"exited with {code}"
            reason = error.read_text() if error.exists() else ""  # empty on a disk that is still full
            raise StepFailed(reason or f"its {what} {ended}; its output is above")


def _started(command: Sequence[str], environment: Mapping[str, str], folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, cwd=folder, start_new_session=True)
