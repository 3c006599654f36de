"""A release across two environments that run one half each: transform in one, predict in the other, postprocess in the first.

``python -m splitserve.checks.across STEP FOLDER ALLOWED`` takes the step of that name in its environment, for every release. The
tensors of the step before come from standard input, its own go to standard output, as JSON.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Literal

import msgspec

from splitserve.checks.examination import Allowed, Loader, Trial, Trying, halves, loaders, served
from splitserve.repository.manifest import BundleError, Kind
from splitserve.repository.release import Release
from splitserve.repository.source import BundleSource, load_fetched
from splitserve.repository.sources.local_folder import LocalFolder
from splitserve.signature import check_outputs
from splitserve.tensors import Tensor

Step = Literal["features", "outputs", "answers"]
"""Features are made of golden rows by preprocessors, outputs of features by predictors. Answers are made of outputs by
preprocessors, and compared with the recorded ones."""

KIND_OF: Mapping[Step, Kind] = {"features": "preprocess", "outputs": "predict", "answers": "preprocess"}


class Passed(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a step has made of the golden rows of a release, or why it, or a step before, could not.

    ``source`` is the environment that it came from. A step passes it on.
    """

    release: str
    tensors: tuple[Tensor, ...] = ()
    reason: str = ""
    source: str = ""


Take = Callable[[str, Step, Sequence[Passed]], Sequence[Passed]]
"""Takes a step in an environment, by its name."""


def combine(preprocess: str, predict: str) -> str:
    """The name of two environments that run a half each."""
    return f"{preprocess} + {predict}"


def across(take: Take, preprocess: Sequence[str], predict: Sequence[str]) -> dict[str, tuple[Trial, ...]]:
    """Run all releases across each environment of preprocess with each of predict.

    Args:
        take: takes a step.
        preprocess: names of environments that run preprocessors only.
        predict: names of environments that run predictors only.

    Returns:
        Trials of the releases by the name of the two environments.
    """
    if not (preprocess and predict):
        return {}
    features = [_from(first, take(first, "features", ())) for first in preprocess]
    outputs = {second: take(second, "outputs", list(chain.from_iterable(features))) for second in predict}
    found: dict[str, tuple[Trial, ...]] = {}
    for first in preprocess:
        sent = [each for second in predict for each in _from(second, [e for e in outputs[second] if e.source == first])]
        answers = take(first, "answers", sent)
        for second in predict:
            found[combine(first, second)] = tuple(
                Trial(each.release, each.reason, "" if each.reason else "agree") for each in answers if each.source == second
            )
    return found


def _from(environment: str, passed: Sequence[Passed]) -> list[Passed]:
    return [msgspec.structs.replace(each, source=environment) for each in passed]


def take_step(source: BundleSource, step: Step, before: Sequence[Passed], allowed: Allowed) -> list[Passed]:
    """Take a step in this environment.

    Args:
        source: the model repository.
        step: which.
        before: what the step before has made; none for the first.
        allowed: what the services' settings allow.

    Raises:
        BundleError: the source cannot be listed, or this environment does not run the half.
    """
    kind = KIND_OF[step]
    load = loaders(allowed).get(kind)
    if load is None:
        raise BundleError(f"{step}: the packages that run {kind} bundles are not installed")
    releases = {str(release.key): release for release in served(source)}
    passed = [Passed(name) for name in releases] if step == "features" else before
    made = []
    for each in passed:
        with Trying(each.release) as trying:
            if each.reason:
                tensors: tuple[Tensor, ...] = ()
            elif each.release not in releases:
                raise BundleError("it was withdrawn, or its pair released again, meanwhile; run this again")
            else:
                tensors = _TAKE[step](source, releases[each.release], load, each.tensors)
        reason = each.reason or trying.trial.reason
        made.append(Passed(each.release, () if reason else tensors, reason, each.source))
    return made


def _features(source: BundleSource, release: Release, load: Loader, _: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Golden rows (n_rows, …) -> the predictor's inputs (n_rows, …)."""
    from splitserve.checks.verify import golden_rows

    first, second = halves(source, release)
    preprocessor = load_fetched(first, load)
    if differences := preprocessor.differences(second.manifest.inputs, second.manifest.outputs):
        raise BundleError(f"the halves do not fit: {'; '.join(differences)}")
    features: tuple[Tensor, ...] = preprocessor.sent(preprocessor.transform(golden_rows(source, release).inputs))
    return features


def _outputs(source: BundleSource, release: Release, load: Loader, features: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The predictor's inputs (n_rows, …) -> its outputs (n_rows, …)."""
    _, second = halves(source, release)
    predictor = load_fetched(second, load)
    outputs = tuple(predictor.infer(features))
    check_outputs(predictor.outputs, outputs, features[0].n_rows)
    return outputs


def _compared(source: BundleSource, release: Release, load: Loader, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The predictor's outputs (n_rows, …) -> nothing, where the answer is the recorded one."""
    from splitserve.checks.verify import golden_rows
    from splitserve.runtimes.release import check_answer

    first, _ = halves(source, release)
    check_answer(release.manifest, golden_rows(source, release), load_fetched(first, load).answer(outputs))
    return ()


_TAKE: Mapping[Step, Callable[[BundleSource, Release, Loader, tuple[Tensor, ...]], tuple[Tensor, ...]]] = {
    "features": _features,
    "outputs": _outputs,
    "answers": _compared,
}


def main(step: Step, folder: str, allowed: str = "{}") -> int:
    """Take a step in this environment; 1 and the reason if that is not possible.

    Args:
        step: which.
        folder: of the model repository.
        allowed: an `Allowed` as JSON.
    """
    try:
        before = msgspec.json.decode(sys.stdin.buffer.read() or b"[]", type=list[Passed])
        made = take_step(LocalFolder(folder), step, before, msgspec.json.decode(allowed, type=Allowed))
    except (BundleError, msgspec.DecodeError) as error:
        print(error, file=sys.stderr)
        return 1
    print(msgspec.json.encode(made).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))  # type: ignore[arg-type] # `Step` is what the command writes
