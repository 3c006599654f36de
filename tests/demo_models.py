"""The demo models as tests want them: with the pipelines that they were published from."""

from __future__ import annotations

import fcntl
import pickle
from pathlib import Path
from typing import Any, NamedTuple

from splitserve import publish
from training.demo import DEMOS


class Demo(NamedTuple):
    """A demo model: the fitted pipeline, and rows of the kind that it takes."""

    pipeline: Any
    rows: Any


class Demos(NamedTuple):
    """The demo models and the repository that they are published in."""

    repository: Path
    models: dict[str, Demo]


def publish_demos_once(folder: Path) -> Demos:
    """Train and publish the demo models into ``folder``, unless another process of this run has done it."""
    folder.mkdir(exist_ok=True)
    kept = folder / "pipelines.pickle"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            kept.write_bytes(pickle.dumps(publish_demos(folder / "models").models))
    return Demos(folder / "models", pickle.loads(kept.read_bytes()))


def publish_demos(repository: Path) -> Demos:
    """Train the demo models and publish them."""
    models = {name: Demo(*train()) for name, (train, _) in DEMOS.items()}
    for name, (_, input_name) in DEMOS.items():
        publish(*models[name], name=name, repository=repository, input_name=input_name)
    return Demos(repository, models)
