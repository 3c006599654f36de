"""Releases: immutable, append-only records that a pair of bundles was proven as a whole.

``<repository>/<model>/releases/<sequence>-<K.M>/{manifest.json, golden.npz}``

The listing alone gives order and pair. A record either releases a pair or withdraws an earlier release; nothing is ever renamed
over or deleted. This module knows the records and what they mean together (`History`); it does no I/O.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from functools import cached_property, lru_cache
from typing import Literal

import msgspec

from splitserve.repository.manifest import MANIFEST_FILE, BundleError, FileDigest, GoldenRows, Kind, Tolerance
from splitserve.signature import TensorSpec
from splitserve.versions import MODEL_NAME, UNNAMED, Pair, parse_pair

RELEASES_FOLDER = "releases"
SCHEMA_VERSION = 1

MAX_SEQUENCE = 999_999_999

CHANGED_FEATURES, UNKNOWN_FEATURES = "changed features", "unknown features"
"""What an operator can accept explicitly when a pair is released."""

Proof = Literal["pipeline", "halves", "server"]
"""How a release was proven: against the fitted pipeline at publish, by running the halves together, or against a running
third-party predict server."""

_NAME = re.compile(r"([0-9]{4,9})-([1-9][0-9]{0,8}\.(?:0|[1-9][0-9]{0,8}))")
_KEY = re.compile(rf"({MODEL_NAME.pattern})/{RELEASES_FOLDER}/({_NAME.pattern})")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NO_DIGEST = "0" * 64


class ReleaseKey(msgspec.Struct, frozen=True, order=True):
    """Which record: ``penguins/releases/0001-1.1``. Keys of one model sort by sequence."""

    model: str
    sequence: int
    pair: Pair

    def __str__(self) -> str:
        return f"{self.model}/{RELEASES_FOLDER}/{self.folder_name}"

    @property
    def folder_name(self) -> str:
        return f"{self.sequence:04d}-{self.pair}"


@lru_cache(maxsize=2**14)  # the same names are listed at every poll
def parse_folder_name(model: str, name: str) -> ReleaseKey | None:
    """The record in a folder of this name; None if no record is called that."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    sequence, pair = int(match[1]), parse_pair(model, match[2])
    if pair is None or sequence < 1 or f"{sequence:04d}" != match[1]:
        return None
    return ReleaseKey(model, sequence, pair)


def parse_key(text: str) -> ReleaseKey | None:
    """The record that is written so; None if that is none."""
    match = _KEY.fullmatch(text)
    return match and parse_folder_name(match[1], match[2])


class Compared(msgspec.Struct, frozen=True, omit_defaults=True):
    """What was compared to prove a release.

    ``rows`` counts all rows, ``hard_rows`` those made to be difficult, by kind. ``worst`` is the largest difference of each
    output from the pipeline's, measured as tolerances are (docs/publishing.md); 1 for labels if one differs, else 0. Empty where
    there was no pipeline to compare with.
    """

    rows: int
    hard_rows: dict[str, int] = {}
    batch_sizes: tuple[int, ...] = ()
    worst: dict[str, float] = {}


class ReleaseManifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """``manifest.json`` of a release.

    ``preprocessor`` and ``predictor`` are the sha256 of the bundles' manifests. ``predictor`` is "" where a third-party server
    was proven: its signature is in ``server_inputs`` and ``server_outputs`` then. ``inputs`` and ``outputs`` are the signature
    that clients see. ``is_row_wise``: the answer for a row does not depend on the other rows of the call. ``accepted`` lists what
    the operator accepted explicitly: "changed features", "unknown features".

    A record with ``withdraws`` takes back the release of that sequence number, and has no golden samples. ``rolls_back`` is the
    sequence number of the release that a rollback moved away from. ``recorded_by`` says who recorded it, as that machine says:
    nothing proves it. ``digest`` is the sha256 of the file's bytes with 64 zeros in
    the place of the digest.
    """

    schema_version: int
    model: str
    sequence: int
    pair: str
    created: str
    digest: str = _NO_DIGEST
    preprocessor: str = ""
    predictor: str = ""
    proven: Proof = "halves"
    compared: Compared = Compared(0)
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    server_inputs: tuple[TensorSpec, ...] = ()
    server_outputs: tuple[TensorSpec, ...] = ()
    tolerances: dict[str, Tolerance] = {}
    labels: tuple[str, ...] = ()
    output_labels: dict[str, tuple[str, ...]] = {}
    is_row_wise: bool = True
    golden: GoldenRows = "rows"
    accepted: tuple[str, ...] = ()
    files: dict[str, FileDigest] = {}
    withdraws: int = 0
    rolls_back: int = 0
    recorded_by: str = ""

    @property
    def key(self) -> ReleaseKey:
        """The record's place. The pair's form is checked by `decode`."""
        pair = parse_pair(self.model, self.pair)
        assert pair is not None, "decode() checks it"
        return ReleaseKey(self.model, self.sequence, pair)


class _ReleaseVersion(msgspec.Struct):
    schema_version: int


# Made at import: two threads that make the first decoder of a type at the same time crash the process.
_version_decoder = msgspec.json.Decoder(_ReleaseVersion)
_decoder = msgspec.json.Decoder(ReleaseManifest)


def encode(manifest: ReleaseManifest) -> bytes:
    """The file's bytes, indented for readers, with its digest filled in."""
    blank = msgspec.structs.replace(manifest, digest=_NO_DIGEST)
    # A field that is at its default is left out, so the digest is written by hand, as the first field.
    fields = {"digest": _NO_DIGEST, **msgspec.to_builtins(blank)}
    data = msgspec.json.format(msgspec.json.encode(fields), indent=2)
    return data.replace(_NO_DIGEST.encode(), hashlib.sha256(data).hexdigest().encode(), 1)


def decode(data: bytes, key: ReleaseKey) -> ReleaseManifest:
    """The manifest of the record at ``key``.

    Raises:
        BundleError: not JSON, of another schema version, a field is missing, unknown or of the wrong type, the bytes are not
            those of the digest, or it is the manifest of another record. The message names the record.
    """
    where = f"{key}: {MANIFEST_FILE}"
    try:
        found = _version_decoder.decode(data).schema_version
        if found != SCHEMA_VERSION:
            raise BundleError(
                f"{where}: schema version {found}, expected {SCHEMA_VERSION}; publish it again with this splitserve"
            )
        manifest = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{where}: {error}") from None
    _check_digest(data, manifest.digest, where)
    if (manifest.model, manifest.sequence, manifest.pair) != (key.model, key.sequence, str(key.pair)):
        raise BundleError(
            f"{where}: expected the record of {key}, got that of {manifest.model} {manifest.sequence} {manifest.pair}"
        )
    if not manifest.withdraws:
        for name, digest in (("preprocessor", manifest.preprocessor), ("predictor", manifest.predictor)):
            if not _SHA256.fullmatch(digest) and not (name == "predictor" and not digest and manifest.proven == "server"):
                raise BundleError(f'{where}: "{name}": expected a sha256 of 64 hex digits, got {digest[:80]!r}')
    elif not 0 < manifest.withdraws < manifest.sequence:
        raise BundleError(
            f"{where}: withdraws {manifest.withdraws}: expected an earlier sequence number than {manifest.sequence}"
        )
    return manifest


def _check_digest(data: bytes, digest: str, where: str) -> None:
    if _SHA256.fullmatch(digest):
        blank = data.replace(digest.encode(), _NO_DIGEST.encode(), 1)
        if hashlib.sha256(blank).hexdigest() == digest:
            return
    raise BundleError(f"{where}: its bytes are not those of its digest: the file was changed after the release was recorded")


class Release(msgspec.Struct, frozen=True):
    """A record as it was read. ``sha256`` is that of all bytes of its manifest: clients and metrics name a release by it."""

    manifest: ReleaseManifest
    sha256: str

    @property
    def key(self) -> ReleaseKey:
        return self.manifest.key

    @property
    def pair(self) -> Pair:
        return self.manifest.key.pair

    @property
    def sequence(self) -> int:
        return self.manifest.sequence


class History:
    """All records of one model: what serves, in which order.

    Records of equal sequence (two copies of a repository that were merged) are ordered by digest.

    Args:
        records: those that could be read, in any order.
    """

    def __init__(self, records: Iterable[Release] = ()) -> None:
        self.records: tuple[Release, ...] = tuple(sorted(records, key=lambda each: (each.sequence, each.sha256)))
        self.withdrawn: Mapping[int, Release] = {
            record.manifest.withdraws: record for record in self.records if record.manifest.withdraws
        }
        """The withdrawing record by the sequence number that it withdraws."""

    def active(self) -> tuple[Release, ...]:
        """Releases that are not withdrawn, oldest first."""
        return self._active

    @cached_property
    def _active(self) -> tuple[Release, ...]:
        return tuple(each for each in self.records if not each.manifest.withdraws and each.sequence not in self.withdrawn)

    def current(self) -> Release | None:
        """The newest release that is not withdrawn."""
        active = self.active()
        return active[-1] if active else None

    def by_pair(self) -> dict[Pair, Release]:
        """The newest release of each pair that has one which is not withdrawn, in order of release. Not to be changed."""
        return self._by_pair

    @cached_property
    def _by_pair(self) -> dict[Pair, Release]:
        newest: dict[Pair, Release] = {}
        for release in self.active():
            newest.pop(release.pair, None)
            newest[release.pair] = release
        return newest

    def recorded(self, kind: Kind) -> Mapping[int, frozenset[str]]:
        """The versions of one half that releases name, with the digests that they recorded of its manifest.

        There is no digest where a third-party server has the half.
        """
        return self._recorded[kind]

    @cached_property
    def _recorded(self) -> Mapping[Kind, Mapping[int, frozenset[str]]]:
        found: dict[Kind, dict[int, set[str]]] = {"preprocess": {}, "predict": {}}
        for pair, release in self.by_pair().items():
            found["preprocess"].setdefault(pair.preprocessor, set()).add(release.manifest.preprocessor)
            found["predict"].setdefault(pair.predictor, set()).add(release.manifest.predictor)
        return {
            kind: {version: frozenset(digests - {""}) for version, digests in versions.items() if version != UNNAMED}
            for kind, versions in found.items()
        }

    def release_of(self, pair: Pair) -> Release | None:
        """The newest release of a pair that is not withdrawn."""
        return self.by_pair().get(pair)

    def taken_back(self) -> set[Pair]:
        """Pairs of which every release is withdrawn."""
        return {each.pair for each in self.records} - self.by_pair().keys()

    def rollback_target(self) -> Release | None:
        """The newest release that is not current, not withdrawn and was not rolled away from; None if there is none."""
        current = self.current()
        if current is None:
            return None
        rolled_away: set[Pair] = set()
        by_sequence = {each.sequence: each for each in self.records if not each.manifest.withdraws}
        active = {each.sequence for each in self.active()}
        for release in reversed([each for each in self.records if not each.manifest.withdraws]):
            if release.sequence in active and release.pair != current.pair and release.pair not in rolled_away:
                return release
            if source := by_sequence.get(release.manifest.rolls_back):
                rolled_away.add(source.pair)
        return None

    def next_sequence(self) -> int:
        """The number after the highest one recorded."""
        return max((each.sequence for each in self.records), default=0) + 1
