"""What a step's digest is made of."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import splitserve
from splitserve.pipeline.declaration import DeclarationError, Step, TrainingPipeline
from splitserve.pipeline.digests import FORMAT, digest_of, digest_of_file
from splitserve.pipeline.index import Finished
from splitserve.pipeline.sources import Sources


class Dependencies:
    """What the digests of a pipeline's steps are made of; parsed modules are kept in the file ``cache``."""

    def __init__(self, pipeline: TrainingPipeline, cache: Path) -> None:
        self.pipeline = pipeline
        self._sources = Sources([str(root_of(pipeline)), *sys.path], cache)

    def of(self, step: Step, finished: Mapping[str, Finished]) -> dict[str, Any]:
        """All that the step's digest is made of.

        Raises:
            DeclarationError: a file or a module of it is not there.
        """
        module, _, function = step.run.partition(":")
        module = self.pipeline.module_of(module)
        if self._sources.file_of(module) is None and not module.startswith("splitserve."):
            expected = root_of(self.pipeline) / f"{module.replace('.', '/')}.py"
            raise DeclarationError(f'step "{step.name}": module {module} does not exist; expected {expected}')
        values = self.pipeline.parameters
        return {
            "format": FORMAT,
            "function": f"{module}:{function}",
            "parameters": {name: values[name] for name in (*step.parameters, *step.files)},
            "files": {name: digest_of_file(file_of(self.pipeline, step, name)) for name in step.files},
            "environment": {name: os.environ.get(name) for name in step.environment},
            "lock": locked_versions(self.pipeline.path(step.lock)) if step.lock else None,
            "image": None,  # the runner knows it
            "python": "{}.{}".format(*sys.version_info),
            "splitserve": splitserve.__version__,
            "sources": self._reached(step),
            "inputs": {path: digest for path, digest, _ in inputs_of(step, finished)},
        }

    def modules_of(self, step: Step) -> dict[str, Path]:
        """The files of the project's modules that a step reaches, by their paths below the folder that they are imported from."""
        found: dict[str, Path] = {}
        for name in self._reached(step):
            if (file := self._sources.file_of(name)) is not None:
                base = name.replace(".", "/")
                found[f"{base}/__init__.py" if file.name == "__init__.py" else f"{base}.py"] = file
        return found

    def _reached(self, step: Step) -> dict[str, str]:
        modules = (step.run.partition(":")[0], *step.extra_modules)
        return self._sources.reached(map(self.pipeline.module_of, modules))


def root_of(pipeline: TrainingPipeline) -> Path:
    """The folder that the pipeline's package is imported from."""
    return pipeline.folder.resolve().parents[len(pipeline.package.split(".")) - 1]


def file_of(pipeline: TrainingPipeline, step: Step, parameter: str) -> Path:
    """The file that a parameter of a step names.

    Raises:
        DeclarationError: there is none.
    """
    path = pipeline.path(str(pipeline.parameters[parameter]))
    if not path.is_file():
        raise DeclarationError(f'step "{step.name}": parameter "{parameter}" names {path}, which is not a file')
    return path


def inputs_of(step: Step, finished: Mapping[str, Finished]) -> Iterator[tuple[str, str, Path]]:
    """Path, digest and file of each input of a step.

    Raises:
        DeclarationError: an earlier step did not write what the step declares.
    """
    for declared in step.inputs:
        name, _, wanted = declared.partition("/")
        source = finished[name]
        chosen = [path for path in source.outputs if not wanted or path == wanted or path.startswith(f"{wanted}/")]
        if not chosen:
            raise DeclarationError(f'step "{step.name}" reads "{declared}", which step "{name}" did not write; it wrote: '
                             f"{', '.join(source.outputs) or 'nothing'}")  # fmt: skip
        for path in chosen:
            yield f"{name}/{path}", source.outputs[path], Path(source.folder) / path


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between what two digests were made of, e.g. ``["parameters seed", "sources churn.train"]``."""
    found = []
    for key in new:
        before, after = old.get(key), new[key]
        if isinstance(before, dict) and isinstance(after, dict):
            names = [*after, *(name for name in before if name not in after)]
            found += [f"{key} {name}" for name in names if digest_of(before.get(name)) != digest_of(after.get(name))]
        elif digest_of(before) != digest_of(after):
            found.append(key)
    return found


def locked_versions(lock: Path) -> list[str]:
    """The requirements of a lock, sorted, without hashes and comments: these do not change what is installed.

    Raises:
        DeclarationError: there is no such file.
    """
    try:
        lines = lock.read_text().splitlines()
    except OSError as error:
        raise DeclarationError(f"lock {lock}: {error.strerror}; it is relative to the pipeline's folder") from None
    requirements = (line.partition("#")[0].rstrip(" \\").strip() for line in lines)
    return sorted(line for line in requirements if line and not line.startswith("--"))
