"""The support matrix: loads every bundle of a repository in an environment and judges every pair by its halves.

``python -m splitserve.checks.matrix FOLDER`` loads the bundles and prints a `Report` as JSON. It needs only what a service's
image has, and loads the halves that can run there; `judge` combines the reports of several environments.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Literal

import msgspec

from splitserve import __version__
from splitserve.repository import environment, pairing
from splitserve.repository.bundle import KINDS, Bundle, BundleKey
from splitserve.repository.manifest import BundleError, Kind, Manifest
from splitserve.repository.routes import Route
from splitserve.repository.source import BundleSource, load_bundle
from splitserve.repository.sources.local_folder import LocalFolder
from splitserve.versions import Pair

HERE = "here"
"""The environment of this process."""

_PACKAGES = ("scikit-learn", "numpy", "scipy", "pandas", "skops", "onnxruntime")


class Allowed(msgspec.Struct, frozen=True):
    """What the services' settings allow, and the runtime of transforms; named like these settings."""

    trusted_modules: tuple[str, ...] = ()
    environment_mismatch: bool = False
    fingerprint_mismatch: bool = False
    unsafe_pickle: bool = False
    runtime: Literal["auto", "sklearn", "onnx"] = "auto"


NOTHING_MORE = Allowed()


class Trial(msgspec.Struct, frozen=True, omit_defaults=True):
    """The result of loading a bundle.

    ``reason``: why it was refused, "" if it was not. ``golden``: "agree" or "differ", "" if its samples were not replayed.
    ``warnings``: differences of the environment that are allowed.
    """

    bundle: str
    reason: str = ""
    golden: str = ""
    warnings: tuple[str, ...] = ()


class Report(msgspec.Struct, frozen=True):
    """One environment: versions by package, the halves that can be run there, and a trial of each bundle of theirs."""

    packages: dict[str, str]
    kinds: tuple[Kind, ...]
    trials: tuple[Trial, ...]


class Verdict(msgspec.Struct, frozen=True):
    """Whether a pair is admitted in an environment, and why not, or with which warnings."""

    is_admitted: bool
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


class JudgedPair(msgspec.Struct, frozen=True):
    """A pair: its part in the route of its model, "" if it has none, and a verdict for each environment."""

    model: str
    pair: str
    route: str
    verdicts: dict[str, Verdict]


class Matrix(msgspec.Struct, frozen=True):
    """The support matrix.

    ``environments``: reports by the environment's name. ``made_with``: by bundle, the versions that it depends on. The names in
    the verdicts are those of environments, or, if none runs both halves, one of preprocess and one of predict joined by " + ".
    ``problems``: why this must not be deployed.
    """

    environments: dict[str, Report]
    made_with: dict[str, str]
    pairs: tuple[JudgedPair, ...]
    problems: tuple[str, ...]


def examine(source: BundleSource, allowed: Allowed = NOTHING_MORE) -> Report:
    """Load every bundle whose half can run in this process, replay its golden samples, and unload it.

    Raises:
        BundleError: the source cannot be listed.
    """
    loaders = _loaders(allowed)
    trials = tuple(_try(source, key, loaders[key.kind]) for key in source.bundles() if key.kind in loaders)
    return Report({"splitserve": __version__, **environment.observe(_PACKAGES)}, tuple(loaders), trials)


_Loader = Callable[[Bundle], Sequence[str]]
"""Loads a bundle as its service does; returns the warnings."""


def _loaders(allowed: Allowed) -> dict[Kind, _Loader]:
    """Loaders of the halves whose libraries are installed."""
    found: dict[Kind, _Loader] = {}
    with contextlib.suppress(ImportError):
        from splitserve.runtimes import preprocessor

        def load_preprocessor(bundle: Bundle) -> Sequence[str]:
            return preprocessor.load(
                bundle,
                trusted_modules=allowed.trusted_modules,
                allow_environment_mismatch=allowed.environment_mismatch,
                allow_unsafe_pickle=allowed.unsafe_pickle,
                runtime=allowed.runtime,
            ).warnings

        found["preprocess"] = load_preprocessor
    with contextlib.suppress(ImportError):
        from splitserve.runtimes import predictor

        def load_predictor(bundle: Bundle) -> Sequence[str]:
            predictor.load(bundle)
            return ()

        found["predict"] = load_predictor
    return found


def _try(source: BundleSource, key: BundleKey, load: _Loader) -> Trial:
    from splitserve.repository.golden import GoldenDifference  # needs numpy, which is installed wherever bundles are loaded

    try:
        return Trial(str(key), golden="agree", warnings=tuple(load_bundle(source, key, load)))
    except BundleError as error:
        return Trial(str(key), str(error), "differ" if isinstance(error, GoldenDifference) else "")
    except Exception as error:  # one bundle's failure, whatever it is, must not end the others
        return Trial(str(key), f"{key}: failed to load: {type(error).__name__}: {error}")


def refuse(report: Report, reasons: Mapping[str, str]) -> Report:
    """The report with these bundles refused, too."""
    trials = tuple(Trial(trial.bundle, reasons[trial.bundle]) if trial.bundle in reasons else trial for trial in report.trials)
    return msgspec.structs.replace(report, trials=trials)


def judge(source: BundleSource, reports: Mapping[str, Report], *, allow_fingerprint_mismatch: bool = False) -> Matrix:
    """The matrix of a repository from the reports of environments by name.

    Raises:
        BundleError: the source cannot be listed.
    """
    keys = tuple(source.bundles())
    manifests = {str(key): manifest for key in keys if (manifest := _manifest(source, key))}
    routes, broken_routes = _routes(source, sorted({key.model for key in keys}))
    judged = _Judge(manifests, _stacks(reports), allow_fingerprint_mismatch)
    pairs = tuple(judged.pair(model, pair, _part(pair, routes.get(model))) for model, pair in _pairs(keys, routes))
    return Matrix(
        dict(reports),
        {bundle: _made_with(manifest) for bundle, manifest in manifests.items()},
        pairs,
        (*broken_routes, *_problems(sorted({key.model for key in keys}), pairs, reports)),
    )


def _routes(source: BundleSource, models: Sequence[str]) -> tuple[dict[str, Route], list[str]]:
    """The routes of the models that have one, and the problems of those that are invalid."""
    found, problems = {}, []
    for model in models:
        try:
            if route := source.route(model):
                found[model] = route
        except BundleError as error:
            problems.append(str(error))
    return found, problems


def _manifest(source: BundleSource, key: BundleKey) -> Manifest | None:
    """None if it is invalid; the trials say why."""
    try:
        return source.open(key).manifest
    except BundleError:
        return None


def _made_with(manifest: Manifest) -> str:
    made_with = manifest.environment
    if manifest.kind == "preprocess":
        return f"scikit-learn {made_with.get('scikit-learn', '?')}"
    return ", ".join(
        f"{name} {made_with[name]}" for name in sorted(made_with, key=str.lower) if name.startswith(("ONNX IR", "opset "))
    ).replace("opset ai.onnx ", "opset ")


def _pairs(keys: Sequence[BundleKey], routes: Mapping[str, Route]) -> Iterator[tuple[str, Pair]]:
    """All combinations of the bundles, and the pairs that routes name."""
    for model in sorted({key.model for key in keys}):
        versions = {kind: [key.version for key in keys if (key.model, key.kind) == (model, kind)] for kind in KINDS}
        made = {Pair(*numbers) for numbers in product(versions["preprocess"], versions["predict"])}
        routed = set(routes[model].named()) if model in routes else set()
        yield from ((model, pair) for pair in sorted(made | routed))


def _part(pair: Pair, route: Route | None) -> str:
    """A pair's part in a route: a share of the requests, "shadow", both, or ""."""
    if route is None:
        return ""
    total = sum(entry.weight for entry in route.pairs)
    shares = [entry.weight / (total or 1) for entry in route.pairs if entry.pair == str(pair)]
    parts = [f"{100 * sum(shares):.3g} %"] if shares else []
    return " and ".join(parts + ["shadow"] * (route.shadow == str(pair)))


def _stacks(reports: Mapping[str, Report]) -> dict[str, dict[Kind, Report]]:
    """Environments for pairs: each that runs both halves, and each of preprocess combined with each of predict."""
    only: dict[Kind, dict[str, Report]] = {
        kind: {name: report for name, report in reports.items() if report.kinds == (kind,)} for kind in KINDS
    }
    stacks: dict[str, dict[Kind, Report]] = {
        name: {"preprocess": report, "predict": report} for name, report in reports.items() if set(report.kinds) == set(KINDS)
    }
    for (first, preprocess), (second, predict) in product(only["preprocess"].items(), only["predict"].items()):
        stacks[f"{first} + {second}"] = {"preprocess": preprocess, "predict": predict}
    return stacks


class _Judge:
    """Derives verdicts from manifests and trials."""

    def __init__(
        self,
        manifests: Mapping[str, Manifest],
        stacks: Mapping[str, Mapping[Kind, Report]],
        allow_fingerprint_mismatch: bool,
    ) -> None:
        self._manifests = manifests
        self._stacks = stacks
        self._allow_fingerprint_mismatch = allow_fingerprint_mismatch

    def pair(self, model: str, pair: Pair, part: str) -> JudgedPair:
        """One pair in all environments."""
        halves = {
            "preprocess": str(BundleKey(model, "preprocess", pair.preprocessor)),
            "predict": str(BundleKey(model, "predict", pair.predictor)),
        }
        verdicts = {
            name: self._verdict([self._trial(stack[kind], halves[kind]) for kind in KINDS])
            for name, stack in self._stacks.items()
        }
        return JudgedPair(model, str(pair), part, verdicts)

    def _trial(self, report: Report, bundle: str) -> Trial:
        """The trial of a bundle; a refusal if it is not published."""
        found = next((trial for trial in report.trials if trial.bundle == bundle), None)
        if found is None or (not found.reason and bundle not in self._manifests):
            return Trial(bundle, f"{bundle}: not published")
        return found

    def _verdict(self, halves: Sequence[Trial]) -> Verdict:
        warnings = tuple(warning for half in halves for warning in half.warnings)
        if refused := tuple(half.reason for half in halves if half.reason):
            return Verdict(False, refused)
        preprocessor, predictor = (self._manifests[half.bundle] for half in halves)
        if differences := pairing.misfits(preprocessor, predictor.inputs, predictor.outputs):
            return Verdict(False, (f"the halves do not fit: {'; '.join(differences)}",))
        if other := pairing.other_meaning(preprocessor, predictor.fingerprint, predictor.feature_names):
            if not self._allow_fingerprint_mismatch:
                return Verdict(False, (f"the halves do not fit: {other}",))
            warnings += (f"{other}, allowed",)
        return Verdict(True, warnings=warnings)


def _problems(models: Sequence[str], pairs: Sequence[JudgedPair], reports: Mapping[str, Report]) -> Iterator[str]:
    """Why the repository must not be deployed."""
    kinds = {kind for report in reports.values() for kind in report.kinds}
    for kind, name in (("preprocess", "preprocessors"), ("predict", "predictors")):
        if kind not in kinds:
            yield f"{', '.join(reports)}: no pair can be checked, no environment runs {name}"
    for pair in pairs:
        if pair.route:
            for name, verdict in pair.verdicts.items():
                if not verdict.is_admitted:
                    yield f"{name}: {pair.model} {pair.pair}, named by its route, is refused: {'; '.join(verdict.reasons)}"
    for model in models:
        verdicts = [pair.verdicts for pair in pairs if pair.model == model]
        if not verdicts:
            yield f"{model} has no pair: only one of its halves is published"
        for name in verdicts[0] if verdicts else ():
            if not any(each[name].is_admitted for each in verdicts):
                yield f"{name}: {model} has no admitted pair"


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
