"""Records of releases: what is written, what is refused, and what serves."""

import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.repository.manifest import BundleError, FileDigest, Tolerance
from splitserve.repository.release import (
    SCHEMA_VERSION,
    Compared,
    History,
    Release,
    ReleaseKey,
    ReleaseManifest,
    decode,
    encode,
    parse_folder_name,
    parse_key,
)
from splitserve.repository.releases import MAX_GOLDEN_BYTES, decode_release
from splitserve.versions import Pair

DIGEST = "a" * 64


def manifest(sequence: int = 1, pair: str = "1.1", **fields: object) -> ReleaseManifest:
    known = {"preprocessor": DIGEST, "predictor": "b" * 64} if not fields.get("withdraws") else {}
    return ReleaseManifest(
        schema_version=SCHEMA_VERSION, model="wine", sequence=sequence, pair=pair, created="2026-11-30T00:00:00+00:00",
        **{**known, **fields},
    )  # fmt: skip


def release(sequence: int, pair: str, sha256: str = "", **fields: object) -> Release:
    return Release(manifest(sequence, pair, **fields), sha256 or f"{sequence:064d}")


def sequence_of(found: Release | None) -> int:
    return found.sequence if found else 0


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"model.onnx": FileDigest(DIGEST, 1)}, "'model.onnx' cannot be the name of a file; expected golden.npz only"),
        ({"golden.npz": FileDigest("A" * 64, 1)}, "golden.npz: expected a sha256 of 64 hex digits and a size"),
        ({"golden.npz": FileDigest(DIGEST, MAX_GOLDEN_BYTES + 1)}, "its files have 8388609 bytes; the limit is 8388608"),
    ],
)
def test_a_record_has_golden_samples_and_no_other_file(files: dict[str, FileDigest], complaint: str):
    """They are checked before they are fetched; the message names the record."""
    written = manifest(files=files)

    with pytest.raises(BundleError, match=f"^wine/releases/0001-1.1: manifest.json: {re.escape(complaint)}"):
        decode_release(encode(written), written.key)


def test_a_record_is_read_as_it_was_written():
    written = manifest(compared=Compared(10, {"ties": 2}, (1, 7), {"label": 0.0}), tolerances={"label": Tolerance(0.1, 0.2)})

    read = decode(encode(written), written.key)

    assert msgspec.structs.replace(read, digest=written.digest) == written
    assert read.digest != written.digest


@given(st.data())
def test_any_changed_byte_is_detected(data):
    """A release's own manifest is protected against accidents by its digest."""
    encoded = bytearray(encode(manifest(tolerances={"label": Tolerance(0.1, 0.2)})))
    at = data.draw(st.integers(0, len(encoded) - 1))
    encoded[at] = data.draw(st.integers(0, 255).filter(lambda value: value != encoded[at]))

    with pytest.raises(BundleError):
        decode(bytes(encoded), manifest().key)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"schema_version": 99}, "schema version 99, expected 1"),
        ({"model": "beer"}, "expected the record of wine/releases/0001-1.1, got that of beer"),
        ({"pair": "1.2"}, "got that of wine 1 1.2"),
        ({"preprocessor": "abc"}, '"preprocessor": expected a sha256'),
        ({"predictor": ""}, '"predictor": expected a sha256'),
        ({"withdraws": 1, "preprocessor": "", "predictor": ""}, "expected an earlier sequence number than 1"),
    ],
)
def test_a_manifest_that_cannot_be_relied_on_is_refused(changed, complaint):
    written = encode(msgspec.structs.replace(manifest(), **changed))

    with pytest.raises(BundleError, match=complaint):
        decode(written, manifest().key)


def test_an_unknown_field_is_refused():
    """A field that this version does not know could change what the record means."""
    with pytest.raises(BundleError, match="unknown field"):
        decode(encode(manifest()).replace(b'"pair"', b'"pear": 1, "pair"'), manifest().key)


def test_a_server_that_was_proven_has_no_digest_of_a_predictor():
    written = manifest(predictor="", proven="server")

    assert decode(encode(written), written.key).predictor == ""


@pytest.mark.parametrize("name", ["0001-1.1", "0012-3.4", "12345-1.1", "0001-1.0"])
def test_the_name_of_a_folder_gives_order_and_pair(name):
    key = parse_folder_name("wine", name)

    assert key is not None
    assert key.folder_name == name
    assert parse_key(str(key)) == key


@pytest.mark.parametrize("name", ["1-1.1", "0000-1.1", "00012-1.1", "0001-1", "0001-0.1", ".0001-1.1", "0001-1.1x", "x"])
def test_other_folders_are_not_records(name):
    assert parse_folder_name("wine", name) is None


def test_the_newest_release_is_current():
    history = History([release(2, "2.2"), release(1, "1.1")])

    assert sequence_of(history.current()) == 2
    assert list(history.by_pair()) == [Pair(1, 1), Pair(2, 2)]
    assert history.next_sequence() == 3


def test_a_withdrawn_release_does_not_serve():
    history = History([release(1, "1.1"), release(2, "2.2"), release(3, "2.2", withdraws=2)])

    assert sequence_of(history.current()) == 1
    assert history.release_of(Pair(2, 2)) is None
    assert history.next_sequence() == 4


def test_a_pair_can_be_released_again_after_it_was_withdrawn():
    history = History([release(1, "1.1"), release(2, "1.1", withdraws=1), release(3, "1.1")])

    assert sequence_of(history.current()) == 3


def test_a_tie_is_ordered_by_digest():
    """Two copies of a repository that were merged may have two records of one number."""
    one, other = release(2, "2.2", sha256="f" * 64), release(2, "3.3", sha256="e" * 64)

    assert History([one, other]).current() is one
    assert History([other, one]).current() is one


def test_rollback_goes_back_step_by_step():
    """A second rollback goes further back, not to what the first one left."""
    records = [release(1, "1.1"), release(2, "2.2"), release(3, "3.3")]
    assert sequence_of(History(records).rollback_target()) == 2

    records.append(release(4, "2.2", rolls_back=3))
    assert sequence_of(History(records).rollback_target()) == 1

    records.append(release(5, "1.1", rolls_back=4))
    assert History(records).rollback_target() is None


def test_after_a_rollback_a_new_release_rolls_back_to_what_the_rollback_chose():
    records = [release(1, "1.1"), release(2, "2.2"), release(3, "1.1", rolls_back=2), release(4, "3.3")]

    assert sequence_of(History(records).rollback_target()) == 3


def test_a_pair_released_again_after_a_rollback_is_a_target_again():
    records = [release(1, "1.1"), release(2, "2.2"), release(3, "1.1", rolls_back=2), release(4, "2.2"), release(5, "3.3")]

    assert sequence_of(History(records).rollback_target()) == 4


def test_rollback_skips_withdrawn_releases():
    records = [release(1, "1.1"), release(2, "2.2"), release(3, "2.2", withdraws=2), release(4, "3.3")]

    assert sequence_of(History(records).rollback_target()) == 1


def test_without_releases_nothing_serves():
    history = History()

    assert history.current() is None
    assert history.rollback_target() is None
    assert history.next_sequence() == 1


def test_keys_of_a_model_sort_by_sequence():
    keys = [ReleaseKey("wine", 10, Pair(1, 1)), ReleaseKey("wine", 9, Pair(2, 2))]

    assert sorted(keys) == keys[::-1]
