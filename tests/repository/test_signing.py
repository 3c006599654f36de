"""Signatures: signed bundles are read, others are refused before anything else of them is read."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from splitserve.repository.bundle import Bundle, BundleKey
from splitserve.repository.folder import Repository
from splitserve.repository.manifest import SIGNATURE_FILE, BundleError, NotFetched
from splitserve.repository.signing import KeyProblem, NotSigned, Signer, Verifier, signed_by
from tests.repository.bundles import manifest_of
from tests.repository.test_repository import KEY, publish
from tests.signing_keys import Keys, make_keys

MODEL_SIGNING = Path(sys.executable).with_name("model_signing")


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return make_keys(tmp_path)


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """One bundle, not signed."""
    found = Repository(tmp_path / "models")
    publish(found)
    return found


@pytest.fixture
def signed(repository: Repository, keys: Keys) -> Bundle:
    """That bundle, signed."""
    bundle = repository.open(KEY)
    Signer(keys.private).sign(bundle)
    return bundle


def check(repository: Repository, keys: Keys, key: BundleKey = KEY) -> Bundle:
    """Verification in a service that requires signatures."""
    return signed_by(str(keys.public), repository).open(key)


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_signed_bundles_are_accepted(repository: Repository, tmp_path: Path, curve: Any) -> None:
    """With the counterpart of the key, on any of the curves; every file is there."""
    keys = make_keys(tmp_path, key=ec.generate_private_key(curve))
    signature = Signer(keys.private).sign(repository.open(KEY))

    bundle = check(repository, keys)

    assert signature == bundle.folder / SIGNATURE_FILE
    assert bundle.read("golden.npz") == b"samples"


def test_without_a_key_signatures_are_ignored(repository: Repository, signed: Bundle) -> None:
    """A signed bundle is read as any other; without a key a wrong signature has no effect."""
    (signed.folder / SIGNATURE_FILE).write_bytes(b"junk")

    assert signed_by("", repository) is repository
    assert repository.open(KEY).read("golden.npz") == b"samples"


def test_an_unsigned_bundle_is_retryable(repository: Repository, keys: Keys) -> None:
    """It is refused for now, with the command that helps, and read once it is signed."""
    with pytest.raises(NotSigned, match=r'^not signed; "splitserve sign" adds model\.sig$') as raised:
        check(repository, keys)
    assert isinstance(raised.value, NotFetched)

    Signer(keys.private).sign(repository.open(KEY))

    assert check(repository, keys).key == KEY


def test_another_key_is_refused(repository: Repository, signed: Bundle, tmp_path: Path) -> None:
    """Write access to the repository does not give the private key."""
    others = make_keys(tmp_path, "others")

    with pytest.raises(BundleError, match=r"^model\.sig: Key mismatch"):
        check(repository, others)


def test_a_forged_hint_does_not_make_it_our_key(repository: Repository, signed: Bundle, tmp_path: Path) -> None:
    """Which key a signature claims to be by is not signed."""
    ours = make_keys(tmp_path, "ours")
    Signer(ours.private).sign(signed)
    hint = signature_of(signed)["verificationMaterial"]["publicKey"]["hint"]
    Signer(make_keys(tmp_path, "others").private).sign(signed)
    content = signature_of(signed)
    content["verificationMaterial"]["publicKey"]["hint"] = hint
    (signed.folder / SIGNATURE_FILE).write_text(json.dumps(content))

    with pytest.raises(BundleError, match=r"^model\.sig: invalid signature$"):
        check(repository, ours)


def signature_of(bundle: Bundle) -> Any:
    return json.loads((bundle.folder / SIGNATURE_FILE).read_text())


def test_a_changed_manifest_is_refused_before_anything_else_is_read(repository: Repository, signed: Bundle, keys: Keys) -> None:
    """Also if its meaning is unchanged: its bytes are signed. Therefore no digest in it can be replaced."""
    manifest = signed.folder / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    (signed.folder / "pipeline.skops").unlink()

    with pytest.raises(BundleError, match=r"^model\.sig: the signed contents differ in manifest\.json$"):
        check(repository, keys)


def test_a_changed_file_is_refused_as_it_is_read(repository: Repository, signed: Bundle, keys: Keys) -> None:
    """The signature vouches for the digests, and every byte that is read is held against them."""
    (signed.folder / "pipeline.skops").write_bytes(b"fittes")
    bundle = check(repository, keys)

    with pytest.raises(BundleError, match="expected sha256"):
        bundle.read("pipeline.skops")


def test_a_signature_is_of_one_version(repository: Repository, signed: Bundle, keys: Keys) -> None:
    """The signature of another version is refused, and a signed bundle cannot serve as another version."""
    second = publish(repository, BundleKey("penguins", "preprocess", 2))
    shutil.copy(signed.folder / SIGNATURE_FILE, second.folder)
    third = BundleKey("penguins", "preprocess", 3)
    shutil.copytree(signed.folder, repository.folder(third))

    with pytest.raises(BundleError, match=r"the signed contents differ in manifest\.json$"):
        check(repository, keys, second.key)
    with pytest.raises(BundleError, match=r"manifest\.json: expected that of .*, got that of penguins/preprocess/1"):
        check(repository, keys, third)


def changed_payload(bundle: Bundle) -> bytes:
    """The signature with something else under it."""
    content = signature_of(bundle)
    payload = json.loads(base64.b64decode(content["dsseEnvelope"]["payload"]))
    payload["predicate"]["resources"][0]["digest"] = "00" * 32
    content["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    "forge",
    [
        lambda bundle: b"",
        lambda bundle: b"junk",
        lambda bundle: b"\xff\xfe",
        lambda bundle: b"{}",
        lambda bundle: b"[" * 100_000,
        lambda bundle: json.dumps({**signature_of(bundle), "dsseEnvelope": {}}).encode(),
        lambda bundle: json.dumps({**signature_of(bundle), "dsseEnvelope": None}).encode(),
        lambda bundle: (bundle.folder / SIGNATURE_FILE).read_bytes()[:-20],
        changed_payload,
    ],
    ids=["empty", "junk", "no text", "no signature", "deep", "no envelope", "null", "cut", "changed"],
)
def test_an_invalid_signature_file_is_refused(repository: Repository, signed: Bundle, keys: Keys, forge: Any) -> None:
    """Whatever model-signing happens to raise."""
    (signed.folder / SIGNATURE_FILE).write_bytes(forge(signed))

    with pytest.raises(BundleError, match=r"^model\.sig: "):
        check(repository, keys)


def test_a_signature_that_is_not_a_regular_file_is_not_read(repository: Repository, keys: Keys) -> None:
    """A pipe would be waited for, a link leads out of the repository, a large file fills the memory."""
    file = repository.folder(KEY) / SIGNATURE_FILE
    for make, message in (
        (lambda: os.mkfifo(file), "is a pipe"),
        (lambda: file.symlink_to("/dev/zero"), "symbolic link"),
        (file.mkdir, "Is a directory"),
    ):
        make()
        with pytest.raises(BundleError, match=message):
            check(repository, keys)
        file.rmdir() if file.is_dir() else file.unlink()
    with file.open("wb") as sparse:
        sparse.truncate(2**40)
    with pytest.raises(BundleError, match="the limit is"):
        check(repository, keys)


def test_a_manifest_cannot_list_the_signature(repository: Repository) -> None:
    """It is made after the manifest."""
    written = repository.write(manifest_of(BundleKey("a", "predict", 1)), {"model.sig": b"x"})

    with pytest.raises(BundleError, match=r"'model\.sig' cannot be the name of a file"):
        repository.open(written.key)


def model_signing(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([MODEL_SIGNING, *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.heavy
def test_the_model_signing_command_accepts_our_signatures(signed: Bundle, keys: Keys) -> None:
    """Signatures can be checked without splitserve."""
    command = ("verify", "key", "--signature", signed.folder / SIGNATURE_FILE, "--public_key", keys.public, signed.folder)

    good = model_signing(*command)
    (signed.folder / "golden.npz").write_bytes(b"sample")
    bad = model_signing(*command)

    assert (good.returncode, bad.returncode) == (0, 1), good.stderr
    assert "golden.npz" in bad.stderr


@pytest.mark.heavy
def test_we_accept_signatures_of_the_model_signing_command(repository: Repository, keys: Keys) -> None:
    """Nor to make one."""
    folder = repository.folder(KEY)
    made = model_signing("sign", "key", "--signature", folder / SIGNATURE_FILE, "--private_key", keys.private, folder)

    assert made.returncode == 0, made.stderr
    assert check(repository, keys).key == KEY


def test_a_signature_that_leaves_a_file_out_is_refused(repository: Repository, keys: Keys) -> None:
    """Its list of ignored files has no effect, since such files are not signed."""
    folder = repository.folder(KEY)
    options = ("--signature", folder / SIGNATURE_FILE, "--private_key", keys.private)
    made = model_signing("sign", "key", *options, "--ignore-paths", folder / "pipeline.skops", folder)

    assert made.returncode == 0, made.stderr
    with pytest.raises(BundleError, match=r"the signed contents differ in pipeline\.skops$"):
        check(repository, keys)


def test_a_signature_of_more_files_than_there_are_is_refused(repository: Repository, keys: Keys) -> None:
    """Something was taken away since."""
    folder = repository.folder(KEY)
    (folder / "more.txt").write_text("")
    made = model_signing("sign", "key", "--signature", folder / SIGNATURE_FILE, "--private_key", keys.private, folder)
    (folder / "more.txt").unlink()

    assert made.returncode == 0, made.stderr
    with pytest.raises(BundleError, match=r"the signed contents differ in that files are missing$"):
        check(repository, keys)


def test_a_damaged_bundle_is_not_signed(repository: Repository, keys: Keys) -> None:
    """Signing reads every file first; the signature that was there stays."""
    bundle = repository.open(KEY)
    Signer(keys.private).sign(bundle)
    before = (bundle.folder / SIGNATURE_FILE).read_bytes()
    (bundle.folder / "golden.npz").write_bytes(b"sample!")

    with pytest.raises(BundleError, match=r"^golden\.npz: expected sha256"):
        Signer(keys.private).sign(bundle)

    assert (bundle.folder / SIGNATURE_FILE).read_bytes() == before
    assert sorted(path.name for path in bundle.folder.parent.iterdir()) == ["1"]


def test_an_invalid_key_is_named(tmp_path: Path) -> None:
    """At start, not at the first bundle."""
    rsa_key = make_keys(tmp_path, "rsa", rsa.generate_private_key(public_exponent=65537, key_size=2048))
    other_curve = make_keys(tmp_path, "curve", ec.generate_private_key(ec.SECP256K1()))
    locked = make_keys(tmp_path, "locked", password=b"secret")
    (tmp_path / "junk.pem").write_text("junk")

    for kind, key, message in (
        (Verifier, tmp_path / "none.pem", r"none\.pem: No such file or directory$"),
        (Verifier, tmp_path, "Is a directory$"),
        (Verifier, tmp_path / "junk.pem", r"junk\.pem: "),
        (Verifier, rsa_key.public, r"rsa\.pub\.pem: expected a key on the curve P-256, P-384 or P-521$"),
        (Verifier, other_curve.public, "Unsupported key for curve 'secp256k1'"),
        (Verifier, make_keys(tmp_path).private, r"key\.pem: "),
        (Signer, rsa_key.private, "expected a key on the curve"),
        (Signer, locked.private, r"locked\.pem: Password was not given"),
    ):
        with pytest.raises(KeyProblem, match=message):
            kind(key)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, keys: Keys) -> None:
    """With the package to install."""
    monkeypatch.setitem(sys.modules, "model_signing", None)

    for kind, key in ((Signer, keys.private), (Verifier, keys.public)):
        with pytest.raises(KeyProblem, match=r'pip install "splitserve\[signing\]"'):
            kind(key)
