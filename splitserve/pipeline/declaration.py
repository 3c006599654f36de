"""What a pipeline is: its steps, what each of them depends on, and its parameters."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from splitserve.pipeline.digests import NotPlainData, canonical


class DeclarationError(Exception):
    """A pipeline, a parameter or a request to run one is invalid; the message says which and what was expected."""


@dataclass(frozen=True)
class Step:
    """One step: a function that gets a `Context` and writes files into ``context.outputs``.

    Attributes:
        name: e.g. ``"train"``.
        run: ``"module:function"``; a module that begins with a dot is relative to the pipeline's package. A string, so that
            neither the runner nor ``status`` import what the step imports.
        inputs: outputs of earlier steps: ``"data"`` for all of a step's, ``"data/train.csv"`` for a file or folder of them.
        parameters: names of the pipeline's parameters that the step reads.
        files: those of its parameters that are paths of files, relative to the pipeline's folder; their bytes are part of the
            step's digest.
        environment: environment variables that the step reads.
        extra_modules: further modules whose source the step depends on without importing them, e.g. what it starts as a process.
        lock: file with the versions of its libraries, relative to the pipeline's folder.
        python: the interpreter of the step's own environment, relative to the pipeline's folder; by default that of the runner.
        runs_in_runner: the step runs in the runner's process and may use ``context.record``: steps that talk to MLflow.
        needs_docker: the step starts containers, so with ``--containers`` it runs on this machine and not in one.
        container_options: further options of ``docker run`` with ``--containers``, e.g. ``("--gpus=all", "--memory=8g")``.
    """

    name: str
    run: str
    inputs: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()
    extra_modules: tuple[str, ...] = ()
    lock: str = ""
    python: str = ""
    runs_in_runner: bool = False
    needs_docker: bool = False
    container_options: tuple[str, ...] = ()

    def upstream(self) -> tuple[str, ...]:
        """Names of the steps whose outputs it reads."""
        return tuple(dict.fromkeys(declared.partition("/")[0] for declared in self.inputs))


@dataclass(frozen=True)
class TrainingPipeline:
    """Steps in the order in which they run.

    Attributes:
        name: also that of the MLflow experiment.
        package: the Python package of the steps, ``__package__`` of the module that declares it.
        folder: of the pipeline's files; relative paths in parameters and locks start there.
        store: folder of the local record, work files and index; by default ``SPLITSERVE_TRAINING_STORE``, else
            ``training-store`` beside the pipeline's folder.
        container_parameters: values that parameters have with ``--containers`` unless they are set.

    Raises:
        DeclarationError: a name is used twice or not declared, a parameter is not plain data.
    """

    name: str
    package: str
    folder: Path
    steps: Sequence[Step]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    store: Path | None = None
    container_parameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for step in self.steps:
            if step.name in seen:
                raise DeclarationError(f'step "{step.name}" is declared twice')
            for name in step.upstream():
                if name not in seen:
                    raise DeclarationError(f'step "{step.name}" reads "{name}", which is not an earlier step; there are: '
                                           f"{', '.join(sorted(seen)) or 'none'}")  # fmt: skip
            for name in (*step.parameters, *step.files):
                if name not in self.parameters:
                    raise DeclarationError(f'step "{step.name}" reads parameter "{name}", which the pipeline does not declare')
            seen.add(step.name)
        for name, value in self.parameters.items():
            check_plain(name, value)

    def with_parameters(self, changed: Mapping[str, Any]) -> TrainingPipeline:
        """The same pipeline with other values of parameters that it has.

        Raises:
            DeclarationError: it has no such parameter, or the value is not plain data.
        """
        for name in changed:
            if name not in self.parameters:
                raise DeclarationError(f'parameter "{name}" does not exist; there are: {", ".join(sorted(self.parameters))}')
        return replace(self, parameters={**self.parameters, **changed})

    def step(self, name: str) -> Step:
        """Raises:
        DeclarationError: there is no such step.
        """
        for step in self.steps:
            if step.name == name:
                return step
        raise DeclarationError(f'step "{name}" does not exist; there are: {", ".join(step.name for step in self.steps)}')

    def module_of(self, name: str) -> str:
        """The absolute name of a module that a step names."""
        return f"{self.package}{name}" if name.startswith(".") else name

    def path(self, relative: str) -> Path:
        """An absolute path of the pipeline's folder; absolute paths stay."""
        return self.folder.resolve() / relative

    def store_folder(self) -> Path:
        """Absolute, and independent of the working directory unless the variable says otherwise."""
        if self.store is not None:
            return self.store.resolve()
        if named := os.environ.get("SPLITSERVE_TRAINING_STORE"):
            return Path(named).resolve()
        return self.folder.resolve().parent / "training-store"


def check_plain(name: str, value: Any) -> None:
    """Raises:
    DeclarationError: the value is not plain data.
    """
    try:
        canonical(value)
    except NotPlainData as error:
        raise DeclarationError(f'parameter "{name}": {error}') from None
