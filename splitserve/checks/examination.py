"""What an environment makes of a model repository: which bundles load there, and which releases answer as recorded.

``python -m splitserve.checks.examination FOLDER`` loads the bundles, replays the golden samples of every release if both halves
run there, and prints a `Report` as JSON. It needs only what a service's image has; `splitserve.checks.matrix` judges reports.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import msgspec

from splitserve import __version__
from splitserve.errors import SplitserveError
from splitserve.repository import environment
from splitserve.repository.bundle import KINDS, Bundle, BundleKey
from splitserve.repository.manifest import BundleError, Kind
from splitserve.repository.release import Release
from splitserve.repository.releases import ReleaseReader
from splitserve.repository.source import BundleSource, fetch_bundle, load_bundle, load_fetched
from splitserve.repository.sources.local_folder import LocalFolder

_PACKAGES = ("scikit-learn", "numpy", "scipy", "pandas", "skops", "onnxruntime")


class Allowed(msgspec.Struct, frozen=True):
    """What the services' settings allow, and the runtime of transforms; named like these settings."""

    trusted_modules: tuple[str, ...] = ()
    environment_mismatch: bool = False
    unsafe_pickle: bool = False
    runtime: Literal["auto", "sklearn", "onnx"] = "auto"


NOTHING_MORE = Allowed()


class Trial(msgspec.Struct, frozen=True, omit_defaults=True):
    """The result of loading a bundle, or of running the whole of a release.

    ``name``: of the bundle or release. ``reason``: why it was refused, "" if it was not. ``golden``: "agree" or "differ", "" if
    its samples were not replayed. ``warnings``: differences of the environment that are allowed.
    """

    name: str
    reason: str = ""
    golden: str = ""
    warnings: tuple[str, ...] = ()


class Report(msgspec.Struct, frozen=True):
    """One environment: versions by package, the halves that can run there, a trial of each bundle of these, and, where both
    halves run, one of each release.
    """

    packages: dict[str, str]
    kinds: tuple[Kind, ...]
    trials: tuple[Trial, ...]
    releases: tuple[Trial, ...] = ()


def examine(source: BundleSource, allowed: Allowed = NOTHING_MORE) -> Report:
    """Load every bundle that can run in this process, and run every release whose halves both can, on their golden samples.

    Raises:
        BundleError: the source cannot be listed.
    """
    load = loaders(allowed)
    keys = tuple(source.bundles())
    trials = tuple(_try(source, key, load[key.kind]) for key in keys if key.kind in load)
    releases: tuple[Trial, ...] = ()
    if load.keys() == set(KINDS):
        releases = tuple(_run(source, release, load) for release in served(source))
    return Report({"splitserve": __version__, **environment.observe(_PACKAGES)}, tuple(load), trials, releases)


def served(source: BundleSource) -> list[Release]:
    """The newest release of each pair that has one.

    Raises:
        BundleError: the source cannot be listed.
    """
    reader = ReleaseReader(source)
    models = sorted({key.model for key in source.bundles()})
    return [release for model in models for release in reader.history(model).by_pair().values()]


Loader = Callable[[Bundle], Any]
"""Loads a bundle as its service does, its golden samples replayed."""


def loaders(allowed: Allowed) -> dict[Kind, Loader]:
    """Loaders of the halves whose libraries are installed. Numpy alone runs portable preprocessors; beside ONNX Runtime, without
    scikit-learn, it is that of an image of predict.
    """
    found: dict[Kind, Loader] = {}
    with contextlib.suppress(ImportError):
        from splitserve.runtimes import predictor

        found["predict"] = predictor.load
    with contextlib.suppress(ImportError):
        from splitserve.runtimes import preprocessor

        if found and find_spec("sklearn") is None:
            return found
        found["preprocess"] = partial(
            preprocessor.load,
            trusted_modules=allowed.trusted_modules,
            allow_environment_mismatch=allowed.environment_mismatch,
            allow_unsafe_pickle=allowed.unsafe_pickle,
            runtime=allowed.runtime,
        )
    return {kind: found[kind] for kind in KINDS if kind in found}


def _try(source: BundleSource, key: BundleKey, load: Loader) -> Trial:
    with Trying(str(key)) as trying:
        trying.warnings = tuple(getattr(load_bundle(source, key, load), "warnings", ()))
    return trying.trial


def _run(source: BundleSource, release: Release, load: Mapping[Kind, Loader]) -> Trial:
    """Run the whole of a release on its golden rows and compare the answer with the recorded one."""
    from splitserve.checks.verify import golden_rows
    from splitserve.runtimes.release import WholeRelease, check_answer

    with Trying(str(release.key)) as trying:
        first, second = halves(source, release)
        whole = WholeRelease(*(load_fetched(each, load[each.key.kind]) for each in (first, second)))
        golden = golden_rows(source, release)
        check_answer(release.manifest, golden, whole.infer(golden.inputs))
    return trying.trial


def halves(source: BundleSource, release: Release) -> tuple[Bundle, Bundle]:
    """The bundles of a release, which are those that were released.

    Raises:
        BundleError: one is missing, or another one than was released, or the predictor is not in the repository.
    """
    if release.manifest.proven == "server":
        raise BundleError("its predictor is a third-party server, which is not in the repository: splitserve verify asks it")
    model, pair = release.key.model, release.pair
    keys = BundleKey(model, "preprocess", pair.preprocessor), BundleKey(model, "predict", pair.predictor)
    first, second = (fetch_bundle(source, key) for key in keys)
    for bundle, digest in ((first, release.manifest.preprocessor), (second, release.manifest.predictor)):
        if bundle.manifest_sha256 != digest:
            raise BundleError(replaced(bundle.key, digest, bundle.manifest_sha256))
    return first, second


def replaced(key: BundleKey, expected: str, got: str) -> str:
    return f"{key}: is not the bundle that was released: expected the sha256 {expected} of its manifest, got {got}"


class Trying:
    """Records the outcome of a ``with`` block as a trial: one failure must not end the other trials."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.warnings: tuple[str, ...] = ()
        self.trial = Trial(name)

    def __enter__(self) -> Trying:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        from splitserve.repository.golden import GoldenDifference  # needs numpy, which is installed wherever bundles are loaded

        if error is None:
            self.trial = Trial(self.name, golden="agree", warnings=self.warnings)
        elif isinstance(error, BundleError | SplitserveError):
            text = error.message if isinstance(error, SplitserveError) else str(error)
            reason = text if text.startswith(self.name) else f"{self.name}: {text}"
            self.trial = Trial(self.name, reason, "differ" if isinstance(error, GoldenDifference) else "")
        elif isinstance(error, Exception):
            self.trial = Trial(self.name, f"{self.name}: failed to load: {type(error).__name__}: {error}")
        return error is None or isinstance(error, Exception)


def main(folder: str, allowed: str = "{}") -> int:
    """Print the report of this environment as a line of JSON; 1 and the reason if the repository cannot be listed.

    Args:
        folder: of the model repository.
        allowed: an `Allowed` as JSON.
    """
    try:
        report = examine(LocalFolder(folder), msgspec.json.decode(allowed, type=Allowed))
    except BundleError as error:
        print(error, file=sys.stderr)
        return 1
    print(msgspec.json.encode(report).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
