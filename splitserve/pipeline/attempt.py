"""One attempt to run a step: copies of its inputs, its function in a process of its own, a folder of outputs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import splitserve
from splitserve.pipeline.context import Call, Context, StepFailed
from splitserve.pipeline.declaration import Step, TrainingPipeline
from splitserve.pipeline.dependencies import file_of, locked_versions, root_of
from splitserve.pipeline.digests import digest_of_file

if TYPE_CHECKING:
    from splitserve.pipeline.record import Record


@dataclass(frozen=True)
class Attempt:
    """``folder`` is removed after the attempt, ``scratch`` kept for the next one."""

    pipeline: TrainingPipeline
    step: Step
    folder: Path
    scratch: Path

    def run(self, sources: Iterable[tuple[str, str, Path]], *, run_id: str, record: Record) -> Path:
        """Run the step's function on copies of its inputs.

        Args:
            sources: path, digest and file of each input.
            run_id: of its MLflow run.
            record: for a step that runs in this process.

        Returns:
            the folder of its outputs.

        Raises:
            StepFailed: it failed; the message is its own.
        """
        inputs, outputs = self.folder / "inputs", self.folder / "outputs"
        inputs.mkdir()
        outputs.mkdir()
        for path, digest, file in sources:
            target = inputs / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
            if digest_of_file(target) != digest:
                raise StepFailed(f"input {path}: expected SHA-256 {digest}, {file} has another; it was changed during the run")
        step, pipeline = self.step, self.pipeline
        module, _, function = step.run.partition(":")
        error = self.folder / "error"
        call = Call(
            step=step.name,
            module=pipeline.module_of(module),
            function=function,
            parameters={name: pipeline.parameters[name] for name in (*step.parameters, *step.files)},
            files={name: str(file_of(pipeline, step, name)) for name in step.files},
            locked=locked_versions(pipeline.path(step.lock)) if step.lock else [],
            inputs=str(inputs),
            outputs=str(outputs),
            scratch=str(self.scratch),
            error=str(error),
        )
        if step.runs_in_runner:
            context = Context(call)
            context.record, context.run_id = record, run_id
            self._make(call, context)
            return outputs
        (self.folder / "call.json").write_text(json.dumps(asdict(call)))
        if code := self._process(self.folder / "call.json"):
            ended = f"was killed by signal {-code}" if code < 0 else f"exited with {code}"
            died = f"its process {ended}; its output is above"
            raise StepFailed(error.read_text() if error.exists() else died)
        return outputs

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

    def _process(self, call: Path) -> int:
        """Run the step's process; its exit code. It ends when the pipe to its standard input is closed, so with this process."""
        python = str(self.pipeline.path(self.step.python)) if self.step.python else sys.executable
        if not Path(python).exists():
            raise StepFailed(f"{python} does not exist: the step has an environment of its own, with what is in {self.step.lock}")
        paths = [str(root_of(self.pipeline))]
        library = Path(splitserve.__file__).parents[1]
        if "site-packages" not in library.parts:
            paths.append(str(library))
        process = subprocess.Popen(
            [python, "-m", "splitserve.pipeline.worker", call],
            stdin=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "0"},
            cwd=self.pipeline.folder,
            start_new_session=True,
        )
        try:
            return process.wait()
        finally:
            assert process.stdin is not None, "it is a pipe"
            process.stdin.close()
            process.wait()
