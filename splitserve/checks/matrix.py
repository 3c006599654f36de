"""The support matrix: which releases of a repository serve in an environment, and which other pairs could become a release.

It combines what `splitserve.checks.examination` reports of several environments.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import msgspec

from splitserve.checks.across import combine
from splitserve.checks.examination import Report, Trial, replaced
from splitserve.repository import pairing
from splitserve.repository.bundle import KINDS, Bundle, BundleKey
from splitserve.repository.manifest import BundleError, Kind, Manifest
from splitserve.repository.release import History, Release
from splitserve.repository.releases import ReleaseReader
from splitserve.repository.routes import Route
from splitserve.repository.source import BundleSource
from splitserve.versions import Pair

HERE = "here"
"""The environment of this process."""


class Verdict(msgspec.Struct, frozen=True):
    """Whether a release serves, or a pair could become one, in an environment, and why not, or with which warnings."""

    is_admitted: bool
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


class JudgedRelease(msgspec.Struct, frozen=True):
    """The newest release of a pair, and a verdict for each environment.

    ``serves``: "by default", "by route" or both, if requests that name no version get it; only these decide about a deployment.
    """

    model: str
    pair: str
    sequence: int
    serves: str
    verdicts: dict[str, Verdict]


class JudgedPair(msgspec.Struct, frozen=True):
    """A pair without a release, and for each environment whether its halves load and fit: then it could become one."""

    model: str
    pair: str
    verdicts: dict[str, Verdict]


class Matrix(msgspec.Struct, frozen=True):
    """The support matrix.

    ``environments``: reports by the environment's name. ``made_with``: by bundle, the versions that it depends on. The names in
    the verdicts are those of environments, or, if none runs both halves, one of preprocess and one of predict joined by " + ".
    ``problems``: why this must not be deployed.
    """

    environments: dict[str, Report]
    made_with: dict[str, str]
    releases: tuple[JudgedRelease, ...]
    pairs: tuple[JudgedPair, ...]
    problems: tuple[str, ...]


def refuse(report: Report, reasons: Mapping[str, str]) -> Report:
    """The report with these bundles refused, too."""
    trials = tuple(Trial(trial.name, reasons[trial.name]) if trial.name in reasons else trial for trial in report.trials)
    return msgspec.structs.replace(report, trials=trials)


def judge(source: BundleSource, reports: Mapping[str, Report], across: Mapping[str, Sequence[Trial]] | None = None) -> Matrix:
    """The matrix of a repository from the reports of environments.

    Args:
        source: the model repository.
        reports: by the environment's name.
        across: trials of releases that were run across two environments, by the name of the two.

    Raises:
        BundleError: the source cannot be listed.
    """
    keys = tuple(source.bundles())
    models = sorted({key.model for key in keys})
    reader = ReleaseReader(source)
    histories = {model: reader.history(model) for model in models}
    routes, broken_routes = _routes(source, models)
    judged = _Judge(source, keys, _stacks(reports), across or {})
    releases = tuple(
        judged.release(release, _serves(release, histories[model], routes.get(model)))
        for model in models
        for release in histories[model].by_pair().values()
    )
    pairs = tuple(judged.pair(model, pair) for model, pair in _pairs(keys, histories))
    problems = (
        *broken_routes,
        *(problem for model in models for problem in reader.problems.get(model, ())),
        *_problems(models, releases, routes, reports),
    )
    return Matrix(dict(reports), judged.made_with(), releases, pairs, problems)


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


def _pairs(keys: Sequence[BundleKey], histories: Mapping[str, History]) -> Iterator[tuple[str, Pair]]:
    """All combinations of the bundles that have no release."""
    for model, history in histories.items():
        versions = {kind: [key.version for key in keys if (key.model, key.kind) == (model, kind)] for kind in KINDS}
        made = {Pair(*numbers) for numbers in product(versions["preprocess"], versions["predict"])}
        yield from ((model, pair) for pair in sorted(made - history.by_pair().keys()))


def _serves(release: Release, history: History, route: Route | None) -> str:
    """Whether requests that name no version get a release."""
    parts = [
        name
        for name, is_so in (
            ("by default", history.current() is release),
            ("by route", route is not None and release.pair in route.named()),
        )
        if is_so
    ]
    return " and ".join(parts)


def running_only(kind: Kind, reports: Mapping[str, Report]) -> list[str]:
    """Names of the environments that run this half, and not the other."""
    return [name for name, report in reports.items() if report.kinds == (kind,)]


def _stacks(reports: Mapping[str, Report]) -> dict[str, dict[Kind, Report]]:
    """Environments for pairs: each that runs both halves, and each of preprocess combined with each of predict."""
    stacks: dict[str, dict[Kind, Report]] = {
        name: {"preprocess": report, "predict": report} for name, report in reports.items() if set(report.kinds) == set(KINDS)
    }
    for first, second in product(running_only("preprocess", reports), running_only("predict", reports)):
        stacks[combine(first, second)] = {"preprocess": reports[first], "predict": reports[second]}
    return stacks


def _of_both(stack: Mapping[Kind, Report]) -> Sequence[Trial]:
    """Trials of releases in an environment that runs both halves."""
    return stack["predict"].releases if stack["preprocess"] is stack["predict"] else ()


class _Judge:
    """Derives verdicts from manifests and trials.

    Args:
        source: has the manifests.
        keys: of the bundles in it.
        stacks: environments for pairs.
        across: trials of releases in stacks of two environments.
    """

    def __init__(
        self,
        source: BundleSource,
        keys: Sequence[BundleKey],
        stacks: Mapping[str, Mapping[Kind, Report]],
        across: Mapping[str, Sequence[Trial]],
    ) -> None:
        self._bundles: dict[str, Bundle] = {}
        for key in keys:
            with contextlib.suppress(BundleError):  # the trials say what is wrong with it
                self._bundles[str(key)] = source.open(key)
        self._stacks = stacks
        self._wholes = {
            name: {trial.name: trial for trial in (*across.get(name, ()), *_of_both(stack))} for name, stack in stacks.items()
        }

    def made_with(self) -> dict[str, str]:
        """By bundle, the versions that it depends on."""
        return {name: _made_with(bundle.manifest) for name, bundle in self._bundles.items()}

    def release(self, release: Release, serves: str) -> JudgedRelease:
        """A release in all environments."""
        verdicts = {name: self._of_release(stack, self._wholes[name], release) for name, stack in self._stacks.items()}
        return JudgedRelease(release.key.model, str(release.pair), release.sequence, serves, verdicts)

    def pair(self, model: str, pair: Pair) -> JudgedPair:
        """A pair without a release in all environments."""
        return JudgedPair(
            model, str(pair), {name: self._of_pair(self._trials(stack, model, pair)) for name, stack in self._stacks.items()}
        )

    def _of_release(self, stack: Mapping[Kind, Report], wholes: Mapping[str, Trial], release: Release) -> Verdict:
        """The halves are those that were released and load, and the whole answers as recorded."""
        trials = self._trials(stack, release.key.model, release.pair)
        digests: tuple[str, ...] = (release.manifest.preprocessor, release.manifest.predictor)
        if release.manifest.proven == "server":
            trials, digests = trials[:1], digests[:1]
        if refused := tuple(trial.reason for trial in trials if trial.reason):
            return Verdict(False, refused)
        for trial, expected in zip(trials, digests, strict=True):
            bundle = self._bundles[trial.name]
            if bundle.manifest_sha256 != expected:
                return Verdict(False, (replaced(bundle.key, expected, bundle.manifest_sha256),))
        warnings = tuple(warning for trial in trials for warning in trial.warnings)
        if release.manifest.proven == "server":
            return Verdict(True, warnings=(*warnings, _NOT_ASKED))
        whole = wholes.get(str(release.key))
        if whole is None:
            return Verdict(False, (f"{release.key}: recorded while the bundles were loaded; run this again",))
        return Verdict(False, (whole.reason,)) if whole.reason else Verdict(True, warnings=warnings)

    def _of_pair(self, trials: Sequence[Trial]) -> Verdict:
        """The halves load, fit, and the features have the names that the predictor was trained on."""
        if refused := tuple(trial.reason for trial in trials if trial.reason):
            return Verdict(False, refused)
        preprocessor, predictor = (self._bundles[trial.name].manifest for trial in trials)
        if differences := pairing.misfits(preprocessor, predictor.inputs, predictor.outputs):
            return Verdict(False, (f"the halves do not fit: {'; '.join(differences)}",))
        if other := pairing.other_meaning(preprocessor, predictor.fingerprint, predictor.feature_names):
            return Verdict(False, (f"the halves do not fit: {other}",))
        return Verdict(True, warnings=tuple(warning for trial in trials for warning in trial.warnings))

    def _trials(self, stack: Mapping[Kind, Report], model: str, pair: Pair) -> list[Trial]:
        """Those of both halves; a refusal in the place of one that is not published."""
        names: dict[Kind, str] = {
            "preprocess": str(BundleKey(model, "preprocess", pair.preprocessor)),
            "predict": str(BundleKey(model, "predict", pair.predictor)),
        }
        return [self._trial(stack[kind], names[kind]) for kind in KINDS]

    def _trial(self, report: Report, bundle: str) -> Trial:
        found = next((trial for trial in report.trials if trial.name == bundle), None)
        if found is None or (not found.reason and bundle not in self._bundles):
            return Trial(bundle, f"{bundle}: not published")
        return found


_NOT_ASKED = "its predictor is a third-party server, which is not asked here: splitserve verify asks it"


def _made_with(manifest: Manifest) -> str:
    made_with = manifest.environment
    if manifest.kind == "preprocess" and manifest.portable:
        return f"portable, numpy {made_with.get('numpy', '?')}"
    if manifest.kind == "preprocess":
        return f"scikit-learn {made_with.get('scikit-learn', '?')}"
    return ", ".join(
        f"{name} {made_with[name]}" for name in sorted(made_with, key=str.lower) if name.startswith(("ONNX IR", "opset "))
    ).replace("opset ai.onnx ", "opset ")


def _problems(
    models: Sequence[str], releases: Sequence[JudgedRelease], routes: Mapping[str, Route], reports: Mapping[str, Report]
) -> Iterator[str]:
    """Why the repository must not be deployed."""
    kinds = {kind for report in reports.values() for kind in report.kinds}
    for kind, name in (("preprocess", "preprocessors"), ("predict", "predictors")):
        if kind not in kinds:
            yield f"{', '.join(reports)}: no release can be checked, no environment runs {name}"
    for release in releases:
        for name, verdict in release.verdicts.items():
            if release.serves and not verdict.is_admitted:
                which = f"{release.model} {release.pair}, release {release.sequence}, which serves {release.serves}"
                yield f"{name}: {which}, is refused: {'; '.join(verdict.reasons)}"
    released = {(release.model, release.pair) for release in releases}
    for model in models:
        if model not in {release.model for release in releases}:
            yield f"{model} has no release: splitserve release {model} K.M records one"
        for pair in map(str, routes[model].named() if model in routes else ()):
            if (model, pair) not in released:
                yield f"{model} {pair}, named by its route, has no release: splitserve release {model} {pair} records one"
