"""The record of runs in MLflow, and the only module that imports it.

By default a SQLite file and an artifact folder in the pipeline's store; with ``MLFLOW_TRACKING_URI`` a tracking server. Each call
names its run; an open run of the caller, or ``MLFLOW_RUN_ID``, is left alone. Importing this module makes
MLflow quiet. Only files are read, never ``load_model``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from splitserve.arrays import DTYPES
from splitserve.pipeline.context import RecordError, StepFailed, error_message
from splitserve.pipeline.digests import digest_of, digests_of_folder
from splitserve.pipeline.index import FAILED, FINISHED, REUSED, Finished, RunState
from splitserve.repository.release import ReleaseManifest
from splitserve.repository.sources.mlflow_server import without_credentials
from splitserve.signature import TensorSpec

os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")  # it announces the tables that it creates
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # two lines for each step
from mlflow.entities import LifecycleStage, Metric, Param, RunStatus
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.tracking import MlflowClient
from mlflow.types import Schema
from mlflow.types import TensorSpec as MlflowTensorSpec
from mlflow.utils.file_utils import local_file_uri_to_path

STEP_TAG, DIGEST_TAG, REUSED_TAG, ERROR_TAG = "splitserve.step", "splitserve.digest", "splitserve.reused", "splitserve.error"
STORE_TAG = "splitserve.store"
"""Of a run: which store's runner has started it."""

MODEL_FOLDER = "model"
FLAVOR = "splitserve"
"""Of a registered version whose files are a model repository."""

_STATUSES = {FINISHED: "FINISHED", FAILED: "FAILED"}
"""MLflow's status of a run by its state here; all others are ``KILLED``."""

_METRICS_IN_ONE_CALL, _PARAMETERS_IN_ONE_CALL, _LONGEST_VALUE = 1000, 100, 6000


class _Client:
    """MLflow's client, whose errors become a `RecordError` of one line, without passwords: each store has classes of its own."""

    def __init__(self, uri: str, registry_uri: str) -> None:
        self._uri = uri
        self._client = _call(uri, "connect", MlflowClient, uri, registry_uri)

    def __getattr__(self, name: str) -> Any:
        return partial(_call, self._uri, name, getattr(self._client, name))


def _call(uri: str, name: str, function: Callable[..., Any], *values: Any, **named: Any) -> Any:
    """Raises:
    RecordError: the function fails, in whatever way.
    """
    try:
        return function(*values, **named)
    except Exception as error:
        reason = re.sub(r"//[^/@\s]+@", "//", " ".join(error_message(error).split("[SQL:")[0].split()))[:500]
        raise RecordError(f"MLflow at {without_credentials(uri)}: {name}: {reason or type(error).__name__}") from error


def _create_database(file: Path) -> None:
    """MLflow's tables, in a file that gets its name when it has all of them: MLflow refuses a part of them for ever."""
    folder = file.with_name("new-database")
    shutil.rmtree(folder, ignore_errors=True)  # of a runner that was killed
    try:
        folder.mkdir()
        created = SqlAlchemyStore(f"sqlite:///{folder / file.name}", (file.parent / "artifacts").as_uri())
        created.engine.dispose()
        (folder / file.name).replace(file)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Record:
    """MLflow's client for one pipeline. Made while the store's lock is held: creating the tables twice at once would fail."""

    def __init__(self, store: Path, pipeline: str) -> None:
        self.is_remote = bool(os.environ.get("MLFLOW_TRACKING_URI"))
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{store / 'mlflow.db'}"
        self.uri = uri
        if not self.is_remote and not (store / "mlflow.db").exists():
            _call(uri, "create tables", _create_database, store / "mlflow.db")
        self.client = _Client(uri, os.environ.get("MLFLOW_REGISTRY_URI") or uri)
        self._store = store
        self._store_id = digest_of([socket.gethostname(), str(store)])[:32]
        found = self.client.get_experiment_by_name(pipeline)
        location = None if self.is_remote else (store / "artifacts" / pipeline).as_uri()
        if found and location and found.artifact_location != location:  # the folder was moved: new artifacts belong here
            self.client.rename_experiment(found.experiment_id, f"{pipeline}, artifacts in {found.artifact_location}")
            found = None
        self._experiment = found.experiment_id if found else self.client.create_experiment(pipeline, artifact_location=location)

    def start(self, name: str, parameters: Mapping[str, Any], tags: Mapping[str, str] | None = None) -> str:
        """Start a run and log its parameters, which are never logged again.

        Returns:
            Its id.
        """
        run = self.client.create_run(self._experiment, tags={STORE_TAG: self._store_id, **(tags or {})}, run_name=name)
        values = [Param(legal_name(key), json.dumps(value)[:_LONGEST_VALUE]) for key, value in parameters.items()]
        for begin in range(0, len(values), _PARAMETERS_IN_ONE_CALL):
            self.client.log_batch(run.info.run_id, params=values[begin : begin + _PARAMETERS_IN_ONE_CALL])
        return str(run.info.run_id)

    def start_step(
        self, step: str, digest: str, *, parent: str, parameters: Mapping[str, Any] | None = None, reused: str = ""
    ) -> str:
        """Start the run of a step in that of the pipeline; ``reused`` is the run whose outputs are used instead.

        Returns:
            Its id.
        """
        tags = {"mlflow.parentRunId": parent, STEP_TAG: step, DIGEST_TAG: digest}
        return self.start(step, parameters or {}, {**tags, REUSED_TAG: reused} if reused else tags)

    def keep_outputs(self, run_id: str, outputs: Path) -> Path:
        """Upload a step's outputs.

        Returns:
            The folder that has them from now on: in the artifact store if it is a folder, else beside the index.
        """
        self.client.log_artifacts(run_id, str(outputs), "outputs")
        if (there := self.artifacts(run_id)) is not None:
            return there / "outputs"
        return self._keep_beside(run_id, outputs)

    def _keep_beside(self, run_id: str, outputs: Path) -> Path:
        """Move outputs beside the index; where they are then."""
        kept = self._store / "fetched" / run_id
        shutil.rmtree(kept, ignore_errors=True)
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(outputs, kept)
        return kept

    def artifacts(self, run_id: str) -> Path | None:
        """The folder of a run's artifacts; None if they are on a server or in a bucket."""
        uri = self.client.get_run(run_id).info.artifact_uri
        return Path(local_file_uri_to_path(uri)) if uri.startswith(("file:", "/")) else None

    def finish(self, run_id: str, finished: Finished) -> None:
        """Log metrics and the step's own record, and end the run: the last mark."""
        self.log_metrics(run_id, finished.metrics)
        self.client.log_dict(run_id, asdict(finished), "step.json")
        self.end(run_id, "FINISHED")

    def log_metrics(self, run_id: str, metrics: Sequence[Mapping[str, Any]]) -> None:
        """Each (name, at) once; the last value counts."""
        once = {(line["name"], line["at"]): line for line in metrics}
        values = [Metric(legal_name(line["name"]), line["value"], int(line["time"] * 1000), line["at"]) for line in once.values()]
        for begin in range(0, len(values), _METRICS_IN_ONE_CALL):
            self.client.log_batch(run_id, metrics=values[begin : begin + _METRICS_IN_ONE_CALL])

    def end(self, run_id: str, status: str, *, error: str = "") -> None:
        """End a run, or a step's, as ``FINISHED``, ``FAILED`` or ``KILLED``."""
        if error:
            self.client.set_tag(run_id, ERROR_TAG, error[:_LONGEST_VALUE])
        self.client.set_terminated(run_id, status)

    def close(self, run: RunState) -> None:
        """End a run as its state says, and before it what has not ended of its steps. One that was deleted, or is of another
        server, is left.
        """
        try:
            parent = self.client.get_run(run.id)
        except RecordError as error:
            if _says(error, "RESOURCE_DOES_NOT_EXIST"):
                return
            raise
        if parent.info.lifecycle_stage != LifecycleStage.ACTIVE:
            return
        steps = {step.run_id: step for step in run.steps if step.state != REUSED}
        nested = self.client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run.id}'")
        for each in (*nested, parent):
            if not RunStatus.is_terminated(RunStatus.from_string(each.info.status)):
                ended = steps.get(each.info.run_id, run)
                self.end(each.info.run_id, _STATUSES.get(ended.state, "KILLED"), error=ended.why)

    def close_unknown(self) -> None:
        """End the runs that runners of this store have started, and were killed before they wrote down. The store is locked, so
        none of them lives.
        """
        query = f"attributes.status = 'RUNNING' and tags.`{STORE_TAG}` = '{self._store_id}'"
        for run in self.client.search_runs([self._experiment], query):
            self.end(run.info.run_id, "KILLED", error="its runner is dead")

    def fetch(self, step: str, digest: str) -> Finished | None:
        """A step that finished elsewhere on the same tracking server, with its outputs beside the index; None if there is none,
        or if what comes back is not what was recorded.
        """
        query = f"tags.`{DIGEST_TAG}` = '{digest}' and tags.`{STEP_TAG}` = '{step}' and attributes.status = 'FINISHED'"
        for run in self.client.search_runs([self._experiment], query):
            if REUSED_TAG in run.data.tags:
                continue
            run_id = run.info.run_id
            with tempfile.TemporaryDirectory(dir=self._store) as scratch:
                try:
                    own = Path(self.client.download_artifacts(run_id, "step.json", scratch)).read_text()
                    fetched = Path(self.client.download_artifacts(run_id, "outputs", scratch))
                    finished = Finished(**json.loads(own))
                except (RecordError, OSError, ValueError, TypeError):
                    continue
                if finished.digest != digest or digests_of_folder(fetched) != finished.outputs:
                    continue
                finished.folder = str(self._keep_beside(run_id, fetched))
                return finished
        return None

    def register(self, run_id: str, folder: Path, *, model: str, release: ReleaseManifest, tags: Mapping[str, str]) -> str:
        """Upload a model repository with the signature of its release, read it back, and make it a version of a registered model,
        without an alias.

        Returns:
            The version's number.

        Raises:
            StepFailed: what comes back is not what was uploaded; there is no version then.
        """
        described = Model(
            artifact_path=MODEL_FOLDER,
            run_id=run_id,
            signature=ModelSignature(_schema(release.inputs), _schema(release.outputs)),
            flavors={FLAVOR: {"model": release.model, "pair": release.pair}},
        )
        described.save(str(folder / "MLmodel"))
        self.client.log_artifacts(run_id, str(folder), MODEL_FOLDER)
        with tempfile.TemporaryDirectory() as scratch:
            back = digests_of_folder(Path(self.client.download_artifacts(run_id, MODEL_FOLDER, scratch)))
        expected = digests_of_folder(folder)
        if back != expected:
            differing = sorted(set(back.items()) ^ set(expected.items()))[0][0]
            raise StepFailed(
                f"the artifact store does not give back what was uploaded: {differing} differs; nothing is registered"
            )
        try:
            self.client.create_registered_model(model)
        except RecordError as error:
            if not _says(error, "RESOURCE_ALREADY_EXISTS"):
                raise
        source = f"{self.client.get_run(run_id).info.artifact_uri}/{MODEL_FOLDER}"
        return str(self.client.create_model_version(model, source, run_id, tags=dict(tags)).version)

    def champion(self, model: str, alias: str) -> tuple[str, Mapping[str, str]] | None:
        """The version of a registered model with an alias, and its tags; None if it has no such alias."""
        version = self.client.get_registered_model(model).aliases.get(alias)
        return None if version is None else (str(version), dict(self.client.get_model_version(model, version).tags))

    def move_alias(self, model: str, alias: str, version: str) -> None:
        self.client.set_registered_model_alias(model, alias, version)


def _says(error: RecordError, code: str) -> bool:
    return isinstance(error.__cause__, MlflowException) and error.__cause__.error_code == code


def _schema(specs: Sequence[TensorSpec]) -> Schema:
    """A signature as MLflow has it; BF16, which it does not know, as FP32."""
    return Schema([MlflowTensorSpec(DTYPES.get(spec.datatype, DTYPES["FP32"]), spec.wire_shape, spec.name) for spec in specs])


def legal_name(name: str) -> str:
    """A name as MLflow takes it: other characters than letters, digits and ``_-. /`` become hexadecimal, ``:`` ``_x3A_``."""
    return re.sub(r"[^A-Za-z0-9_\-. /]", lambda found: f"_x{ord(found.group()):X}_", name)
