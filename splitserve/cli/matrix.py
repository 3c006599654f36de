"""``splitserve matrix``: which releases serve in this environment or in images, and which pairs could become one."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from splitserve.checks.examination import Allowed, Trial, examine
from splitserve.checks.matrix import HERE, Matrix, Verdict, judge, refuse, running_only
from splitserve.cli.images import ImageError, Images
from splitserve.cli.reading import NoRepository, repository_at
from splitserve.cli.tables import markdown, print_table
from splitserve.repository.manifest import BundleError
from splitserve.repository.signing import KeyProblem, signed_by
from splitserve.repository.source import BundleSource
from splitserve.repository.sources.local_folder import LocalFolder

Form = Literal["text", "json", "markdown"]
Table = tuple[list[str], list[list[str]]]


def run(where: str, images: Sequence[str], *, form: Form, allowed: Allowed, signature_key: str, docker: str) -> int:
    """Print the matrix; 1 if it has problems or cannot be made."""
    try:
        source = repository_at(where)
        matrix = _judged(source, images, allowed, signature_key, docker)
    except (BundleError, ImageError, NoRepository, KeyProblem) as error:
        print(error, file=sys.stderr)
        return 1
    if not matrix.releases and not matrix.problems:
        print(f"no models found in {where}", file=sys.stderr)
        return 1
    if form == "json":
        print(msgspec.json.format(msgspec.json.encode(matrix), indent=2).decode())
    else:
        _print(matrix, form)
        for problem in matrix.problems:
            print(f"not deployable: {problem}", file=sys.stderr)
    return int(bool(matrix.problems))


def _judged(source: BundleSource, images: Sequence[str], allowed: Allowed, signature_key: str, docker: str) -> Matrix:
    """The matrix of these images, or of this environment if there are none.

    Signatures are verified here: the result does not depend on the environment, and images need not have model-signing.
    """
    signed = signed_by(signature_key, source)
    if not images:
        return judge(signed, {HERE: examine(signed, allowed)})
    if not isinstance(source, LocalFolder):
        raise NoRepository("--image mounts the repository: expected a folder, got a URL; copy the repository to a folder")
    there = Images(source.root, allowed, docker)
    unsigned = _refused(signed) if signature_key else {}
    reports = {image: refuse(there.examine(image), unsigned) for image in images}
    trials = there.across(running_only("preprocess", reports), running_only("predict", reports))
    return judge(signed, reports, trials)


def _refused(signed: BundleSource) -> dict[str, str]:
    """By bundle, why it cannot be opened."""
    found = {}
    for key in signed.bundles():
        try:
            signed.open(key)
        except BundleError as error:
            found[str(key)] = f"{key}: {error}"
    return found


class _Notes:
    """Numbered footnotes: a table shows the number, and a text that many cells share is printed once."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        return f"({self.texts.index(text) + 1})"


def _print(matrix: Matrix, form: Form) -> None:
    notes = _Notes()
    for header, rows in (_environments(matrix), _bundles(matrix, notes), _releases(matrix, notes), _pairs(matrix, notes)):
        if not rows:
            continue
        if form == "markdown":
            print(markdown(header, rows))
        else:
            print_table(header, rows)
        print()
    for number, text in enumerate(notes.texts, start=1):
        print(f"({number}) {text}" + "  " * (form == "markdown"))  # two blanks at the end break a line in Markdown
    sys.stdout.flush()


def _environments(matrix: Matrix) -> Table:
    packages = list(dict.fromkeys(name for report in matrix.environments.values() for name in report.packages))
    rows = [[name, *(report.packages.get(package, "-") for package in packages)] for name, report in matrix.environments.items()]
    return ["environment", *packages], rows


def _bundles(matrix: Matrix, notes: _Notes) -> Table:
    trials = {name: {trial.name: trial for trial in report.trials} for name, report in matrix.environments.items()}
    bundles = list(dict.fromkeys(bundle for each in trials.values() for bundle in each))
    rows = [
        [bundle, matrix.made_with.get(bundle, "?"), *(_trial(trials[name].get(bundle), notes) for name in trials)]
        for bundle in bundles
    ]
    return ["bundle", "made with", *trials], rows


def _trial(trial: Trial | None, notes: _Notes) -> str:
    if trial is None:
        return "-"
    if trial.reason:
        outcome = "golden samples differ" if trial.golden == "differ" else "refused"
        return f"{outcome} {notes.mark(trial.reason)}"
    return " ".join(["golden samples agree", *map(notes.mark, trial.warnings)])


def _releases(matrix: Matrix, notes: _Notes) -> Table:
    stacks = _stacks(matrix)
    rows = [
        [each.model, str(each.sequence), each.pair, each.serves, *_verdicts(each.verdicts, stacks, "served", notes)]
        for each in matrix.releases
    ]
    return ["model", "release", "pair", "serves", *stacks], rows


def _pairs(matrix: Matrix, notes: _Notes) -> Table:
    stacks = _stacks(matrix)
    rows = [[each.model, each.pair, *_verdicts(each.verdicts, stacks, "could be released", notes)] for each in matrix.pairs]
    return ["model", "not released", *stacks], rows


def _stacks(matrix: Matrix) -> list[str]:
    verdicts = [*(each.verdicts for each in matrix.releases), *(each.verdicts for each in matrix.pairs)]
    return list(dict.fromkeys(name for each in verdicts for name in each))


def _verdicts(verdicts: Mapping[str, Verdict], stacks: Sequence[str], admitted: str, notes: _Notes) -> list[str]:
    return [_verdict(verdicts[name], admitted, notes) for name in stacks]


def _verdict(verdict: Verdict, admitted: str, notes: _Notes) -> str:
    if not verdict.is_admitted:
        return " ".join(["refused", *map(notes.mark, verdict.reasons)])
    return " ".join([admitted, *map(notes.mark, verdict.warnings)])
