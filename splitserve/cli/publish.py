"""``splitserve publish``: files -> bundles."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from splitserve.repository.bundle import Bundle, BundleKey


def run(
    name: str,
    data: Path | None,
    *,
    mlflow: str,
    rows: Path | None,
    pipeline: Path | None,
    transformer: Path | None,
    onnx: Path | None,
    trained_on: Path | None,
    repository: str,
    version: int | None,
    input_name: str,
    trusted_modules: Sequence[str],
    allow_pickle: bool,
    golden: str,
    targets: Sequence[str],
    time_limit_s: float,
) -> None:
    """Publish the one of pipeline, transformer, onnx and mlflow that is given; exits 1 with the reason if that fails."""
    if sum(bool(given) for given in (pipeline, transformer, onnx, mlflow)) != 1:
        raise typer.BadParameter("give one of --pipeline, --transformer, --onnx and --mlflow")
    if mlflow and data is not None:
        raise typer.BadParameter("--data does not go with --mlflow, whose input example is used; --rows adds more")
    if targets and (transformer is not None or onnx is not None):
        raise typer.BadParameter("--target goes with --pipeline or --mlflow")
    if not mlflow and (data is None or not name):
        raise typer.BadParameter("give NAME and --data")
    if rows is not None and not mlflow and onnx is None:
        raise typer.BadParameter("--rows goes with --onnx or --mlflow; --data has the rows of --pipeline and --transformer")
    if trained_on is not None and onnx is None:
        raise typer.BadParameter("--trained-on goes with --onnx")
    try:
        from splitserve.publishing import PublishError, publish, publish_predictor, publish_preprocessor
        from splitserve.publishing.halves import said_of_golden
        from splitserve.publishing.progress import ending_process
    except ImportError as error:
        print(f'publishing needs more packages ({error.name}): pip install "splitserve[publish]"', file=sys.stderr)
        raise typer.Exit(1) from None
    sys.path.insert(0, "")  # so that --trusted-module finds modules of this folder
    common: dict[str, Any] = {"name": name, "repository": repository, "version": version, "time_limit_s": time_limit_s}
    form: dict[str, Any] = {"trusted_modules": trusted_modules, "allow_pickle": allow_pickle}
    if onnx is not None and golden != "rows":
        raise typer.BadParameter("--golden goes with --pipeline or --transformer: the data of --onnx are its golden samples")
    try:
        with ending_process():
            form["golden"] = golden if golden in ("rows", "synthetic") else read_data(Path(golden))
            if mlflow:
                _publish_registered(mlflow, rows, {**common, "input_name": input_name, "targets": targets}, form)
                return
            assert data is not None, "checked above"
            samples = read_data(data)
            if onnx is not None:
                known = None if trained_on is None else _read_estimator(trained_on, trusted_modules, allow_pickle)
                raw = None if rows is None else read_data(rows)
                bundle = publish_predictor(onnx, samples, trained_on=known, rows=raw, input_name=input_name, **common)
                _say_written(bundle.key, repository)
            elif transformer is not None:
                fitted = _read_estimator(transformer, trusted_modules, allow_pickle)
                bundle = publish_preprocessor(fitted, samples, input_name=input_name, **form, **common)
                _say_written(bundle.key, repository)
                print(said_of_golden(bundle.manifest.golden, _n_golden(bundle)))
                _warn_of_pickle(bundle.key, repository)
            elif pipeline is not None:
                fitted = _read_estimator(pipeline, trusted_modules, allow_pickle)
                published = publish(fitted, samples, input_name=input_name, targets=targets, **form, **common)
                print(published)
                _warn_of_pickle(BundleKey(name, "preprocess", int(published.pair.split(".")[0])), repository)
    except PublishError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None


def _publish_registered(address: str, rows: Path | None, common: dict[str, Any], form: dict[str, Any]) -> None:
    from splitserve.publishing import from_mlflow, publish

    registered = from_mlflow.read(address, trusted_modules=form["trusted_modules"], allow_pickle=form["allow_pickle"])
    samples = from_mlflow.sample_rows(registered, None if rows is None else read_data(rows))
    name = common["name"] or registered.name
    published = publish(registered.pipeline, samples, origin=registered.origin, **form, **{**common, "name": name})
    print(f"{registered.origin} is {published}")
    _warn_of_pickle(BundleKey(name, "preprocess", int(published.pair.split(".")[0])), common["repository"])


def run_test_models(repository: str) -> None:
    """Publish the simple models that are not there yet; exits 1 with the reason if that fails."""
    try:
        from splitserve.publishing import PublishError
        from splitserve.publishing.simple_models import publish_all
    except ImportError as error:
        print(f'publishing needs more packages ({error.name}): pip install "splitserve[publish]"', file=sys.stderr)
        raise typer.Exit(1) from None
    try:
        for name in publish_all(repository):
            print(name)
    except PublishError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None


def _say_written(key: BundleKey, repository: str) -> None:
    from splitserve.repository.writable import writable

    print(f"{key}: {writable(repository).place(key)}")


def _n_golden(bundle: Bundle) -> int:
    from splitserve.repository import golden
    from splitserve.repository.manifest import GOLDEN_FILE

    return golden.decode(bundle.read(GOLDEN_FILE), bundle.manifest.inputs, bundle.manifest.outputs).inputs[0].n_rows


def _warn_of_pickle(key: BundleKey, repository: str) -> None:
    from splitserve.repository.writable import writable
    from splitserve.runtimes.sklearn_pipeline import PICKLE_FILE

    target = writable(repository)
    manifest = target.open(key).manifest
    if PICKLE_FILE in manifest.files and not manifest.portable:  # else the plan serves, and the pickle is not loaded
        print(
            f"skops cannot hold the transforms, so {target.place(key)} is a pickle, which can run any code: services refuse it "
            "unless PREPROCESS_ALLOW_UNSAFE_PICKLE=true",
            file=sys.stderr,
        )


def read_data(path: Path) -> Any:
    """A DataFrame, an array, or arrays by name.

    Raises:
        PublishError: not readable, or of a format that is not known.
    """
    import numpy as np
    import pandas as pd

    from splitserve.publishing import PublishError

    if not path.is_file():
        raise PublishError(f"{path}: no such file")
    try:
        if path.suffix == ".csv":
            return pd.read_csv(path)
        if path.suffix == ".parquet":
            return pd.read_parquet(path)
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
    except ImportError as error:
        raise PublishError(f"{path}: pandas reads Parquet with pyarrow: pip install pyarrow") from error
    except (OSError, ValueError) as error:
        raise PublishError(f"{path}: {error}") from error
    raise PublishError(f"{path}: expected .csv, .parquet, .npy or .npz")


def _read_estimator(path: Path, trusted_modules: Sequence[str], allow_pickle: bool) -> Any:
    """A fitted estimator.

    Raises:
        PublishError: not readable, of a format that is not known, or a pickle that is not allowed.
    """
    from splitserve.publishing import PublishError
    from splitserve.publishing.estimator_files import PICKLES, read_pickle, read_skops

    if path.suffix in PICKLES:
        if not allow_pickle:
            raise PublishError(f"{path}: reading a pickle runs the code in it; save the pipeline with skops.io.dump, or give "
                               "--allow-pickle for a file of your own")  # fmt: skip
        return read_pickle(path, str(path))
    if path.suffix == ".skops":
        return read_skops(path, str(path), trusted_modules)
    raise PublishError(f"{path}: expected .skops, or .joblib or .pkl with --allow-pickle")
