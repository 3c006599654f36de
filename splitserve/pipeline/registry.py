"""A release -> a version of a registered model in MLflow, and the rule of its champion."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from splitserve.pipeline.context import Context, StepFailed
from splitserve.pipeline.digests import digest_of_file
from splitserve.pipeline.images import IMAGES_FILE
from splitserve.repository.folder import Repository
from splitserve.repository.manifest import BundleError
from splitserve.repository.releases import ReleaseReader
from splitserve.repository.sources import index
from splitserve.repository.sources.mlflow_server import INDEX_TAG

CHAMPION = "champion"


def register_release(
    context: Context, models: Path, *, model: str, metric: str, value: float, margin: float = 0.0, alias: str = CHAMPION
) -> None:
    """Register the newest release of a model, and let the alias name it if it is good enough.

    Uploads the repository, reads it back, compares digests, registers the version, then moves the alias: whatever fails before
    that leaves the alias where it was. The version's artifacts are a model repository with an index and with MLflow's description
    of its signature (``MLmodel``), in the folder ``model`` of the run. Names and digests of the images that build made are tags.

    Args:
        context: of a step with ``runs_in_runner=True``.
        models: the model repository that build wrote, beside the `IMAGES_FILE` if it made images; gets an ``index.json``.
        model: its name, also in the registry.
        metric: what the alias is decided by; higher is better.
        value: of this release.
        margin: the alias moves if ``value`` is at least the present champion's minus this.
        alias: which alias.

    Raises:
        StepFailed: the value is not finite, there is no release, a part of it is damaged, or the artifact store does not give
            back what it got.
    """
    if context.record is None:
        raise StepFailed(f'step "{context.step}" needs runs_in_runner=True to use the registry')
    if not math.isfinite(value):
        raise StepFailed(f"metric {metric}: expected a finite number, got {value}; nothing is registered")
    repository = Repository(models)
    try:
        release = ReleaseReader(repository).history(model).current()
        listed, problems = index.build(repository)
    except BundleError as error:
        raise StepFailed(f"{models}: {error}") from error
    if problems:
        raise StepFailed(f"{models}: {'; '.join(problems)}; nothing is registered")
    if release is None:
        raise StepFailed(f"{models}: model {model} has no release; the build step has to publish one")
    tags = {
        "splitserve.pair": str(release.pair),
        "splitserve.metric": metric,
        f"splitserve.metric.{metric}": repr(float(value)),
        INDEX_TAG: digest_of_file(index.write(models, listed)),
        **_image_tags(models.parent / IMAGES_FILE),
    }
    version = context.record.register(context.run_id, models, model=model, release=release.manifest, tags=tags)
    champion = context.record.champion(model, alias)
    is_better, reason = beats(champion, metric, value, margin)
    if is_better:
        context.record.move_alias(model, alias, version)
    print(f"{model} version {version} is registered; {alias}: {reason}", flush=True)
    result = {"model": model, "version": version, "alias": alias, "is_champion": is_better, "reason": reason}
    (context.outputs / "registered.json").write_text(json.dumps(result))


def _image_tags(file: Path) -> dict[str, str]:
    """For each service ``splitserve.image.SERVICE``, a name, and ``splitserve.image.SERVICE.digest``; none without the file."""
    if not file.exists():
        return {}
    tags = {}
    for service, image in json.loads(file.read_text()).items():
        tags[f"splitserve.image.{service}"] = image["name"]
        tags[f"splitserve.image.{service}.digest"] = image["digest"]
    return tags


def beats(champion: tuple[str, Mapping[str, str]] | None, metric: str, value: float, margin: float) -> tuple[bool, str]:
    """Whether a version becomes champion, and why."""
    if champion is None:
        return True, "moved, there was none"
    version, tags = champion
    try:
        present = float(tags[f"splitserve.metric.{metric}"])
    except (KeyError, ValueError):
        return False, f"stays at version {version}, whose {metric} is not recorded; move it by hand"
    if not math.isfinite(present) or value >= present - margin:
        return True, f"moved from version {version}: {metric} {value:.4f}, before {present:.4f}, margin {margin}"
    return False, f"stays at version {version}: {metric} {value:.4f} is below {present:.4f} minus the margin {margin}"
