"""Which release scores, and the whole of it in a process: both halves, loaded as services load them, golden samples replayed."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Protocol

import msgspec

from splitserve.checks.examination import NOTHING_MORE, Allowed, halves, loaders
from splitserve.checks.verify import golden_rows
from splitserve.errors import InvalidInput, NotFound, PairMismatch, at_stage
from splitserve.oip.classification import encode_labels, labels_of
from splitserve.oip.messages import ModelMetadata
from splitserve.repository.defaults import default_release
from splitserve.repository.manifest import BundleError
from splitserve.repository.release import Release
from splitserve.repository.releases import ReleaseReader
from splitserve.repository.signing import KeyProblem, signed_by
from splitserve.repository.source import BundleSource, load_fetched
from splitserve.repository.sources import missing, source_of
from splitserve.scoring.errors import ScoringError
from splitserve.signature import TensorSpec, is_row_wise
from splitserve.tensors import Tensor
from splitserve.versions import Pair, parse_pair


class ScoringRelease(msgspec.Struct, frozen=True):
    """The release of a run: where it is, and what its record says. Every worker loads it again and compares the digests."""

    repository: str
    model: str
    sequence: int
    pair: str
    sha256: str
    preprocessor: str
    predictor: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    ignored: tuple[str, ...] = ()
    labels: str = ""
    is_row_wise: bool = True
    allowed: Allowed = NOTHING_MORE
    signature_key: str = ""

    @property
    def name(self) -> str:
        """``penguins/releases/0001-1.1``"""
        return f"{self.model}/releases/{self.sequence:04d}-{self.pair}"

    def labels_of(self, output: str) -> list[str]:
        """Names of an output's columns; empty if they have none."""
        return labels_of(ModelMetadata(self.model, (), "", (), (), {"labels": self.labels} if self.labels else {}), output)

    @property
    def facts(self) -> dict[str, str]:
        """What identifies it, for keys of shards and metadata of outputs."""
        return {
            "model": self.model,
            "release": self.name,
            "release_sha256": self.sha256,
            "preprocessor_sha256": self.preprocessor,
            "predictor_sha256": self.predictor,
        }


class Clock(Protocol):
    """Adds up seconds by stage."""

    def add(self, stage: str, seconds: float) -> None: ...


class Scorer(Protocol):
    """Answers rows: a loaded release, or a running system."""

    def infer(self, inputs: Sequence[Tensor], clock: Clock) -> Sequence[Tensor]:
        """Raw rows (n_rows, …) -> the answer (n_rows, …).

        Raises:
            SplitserveError: the rows are refused; its stage says by which.
            ScoringError: no row can be answered any more.
        """
        ...


def choose(model: str, repository: str, *, allowed: Allowed = NOTHING_MORE, signature_key: str = "") -> ScoringRelease:
    """The release that ``MODEL[@VERSION]`` names: that of the pair, by default the one that serves requests without a version.

    Raises:
        ScoringError: there is no such repository, model or release, or its record cannot be read.
    """
    name, _, version = model.partition("@")
    try:
        source = _source(repository, signature_key)
        models = sorted({bundle.model for bundle in source.bundles()})
        if name not in models:
            raise ScoringError(f'{repository}: there is no model "{name}"; it has {", ".join(models) or "none"}')
        history = ReleaseReader(source).history(name)
        release = history.release_of(_pair(name, version)) if version else default_release(source, name, history)
        if release is None:
            known = ", ".join(map(str, history.by_pair())) or "none"
            what = f"has no release of {version}" if version else "has no release that serves by default"
            raise ScoringError(f'{repository}: model "{name}" {what}; released pairs: {known}')
        ignored = halves(source, release)[0].manifest.ignored
    except BundleError as error:
        raise ScoringError(str(error)) from error
    except NotFound as error:
        raise ScoringError(error.message) from error
    manifest = release.manifest
    return ScoringRelease(
        repository=repository,
        model=name,
        sequence=release.sequence,
        pair=manifest.pair,
        sha256=release.sha256,
        preprocessor=manifest.preprocessor,
        predictor=manifest.predictor,
        inputs=manifest.inputs,
        outputs=manifest.outputs,
        ignored=ignored,
        labels=encode_labels(manifest.labels, manifest.output_labels),
        is_row_wise=manifest.is_row_wise and is_row_wise(manifest.inputs, manifest.outputs),
        allowed=allowed,
        signature_key=signature_key,
    )


def _pair(model: str, version: str) -> Pair:
    pair = parse_pair(model, version)
    assert pair is not None, "the version is not empty"
    return pair


def _source(repository: str, signature_key: str) -> BundleSource:
    if missing(repository):
        raise ScoringError(f"{repository}: no such model repository; name it with --repository")
    try:
        return signed_by(signature_key, source_of(repository, cache=os.environ.get("MODEL_CACHE", "")))
    except (ValueError, KeyProblem) as error:
        raise ScoringError(str(error)) from error


class LoadedRelease:
    """Both halves of a release in this process.

    Raises:
        ScoringError: it cannot be loaded, is not the one that was chosen, or does not answer its golden samples as recorded.
    """

    def __init__(self, chosen: ScoringRelease) -> None:
        from splitserve.runtimes.release import WholeRelease, check_answer

        try:
            source = _source(chosen.repository, chosen.signature_key)
            list(source.bundles())
            release = _same(ReleaseReader(source).history(chosen.model).active(), chosen)
            load = loaders(chosen.allowed)
            bundles = halves(source, release)
            if absent := {bundle.key.kind for bundle in bundles} - load.keys():
                raise ScoringError(f'{", ".join(absent)} cannot run here; pip install "splitserve[batch]"')
            first, second = (load_fetched(each, load[each.key.kind]) for each in bundles)
            self._whole = WholeRelease(first, second, is_row_wise=chosen.is_row_wise)
            golden = golden_rows(source, release)
            check_answer(release.manifest, golden, self._whole.infer(golden.inputs))
        except BundleError as error:
            raise ScoringError(str(error)) from error
        self._model, self._pair = chosen.model, chosen.pair

    def infer(self, inputs: Sequence[Tensor], clock: Clock) -> Sequence[Tensor]:
        """As the services answer, with the errors that they give.

        Raises:
            SplitserveError: the rows are refused.
        """
        began = time.perf_counter()
        with at_stage("preprocess", model=self._model, pair=self._pair):
            features = self._whole.features(inputs)
        between = time.perf_counter()
        with at_stage("predict", model=self._model, pair=self._pair):
            try:
                answer = self._whole.answer(features)
            except InvalidInput as error:
                if self._whole.preprocessor.passes_on:
                    raise
                raise PairMismatch(f"the predictor refused what the preprocessor made: {error.message}") from error
        clock.add("preprocess", between - began)
        clock.add("predict", time.perf_counter() - between)
        return answer


def _same(releases: Sequence[Release], chosen: ScoringRelease) -> Release:
    """Raises:
    ScoringError: the release was withdrawn or changed since it was chosen.
    """
    for release in releases:
        if release.sequence == chosen.sequence and release.sha256 == chosen.sha256:
            return release
    raise ScoringError(f"{chosen.name}: the release was withdrawn or changed since the run began")
