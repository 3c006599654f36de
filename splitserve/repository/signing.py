"""Signatures of bundles: made with a private key, verified with the public one, by the OpenSSF's model-signing. No network.

A bundle's signature is ``model.sig`` in its folder, in model-signing's format for folders: the digests of all other files,
including the manifest. It can be added to a published bundle, which it does not change, and be replaced. model-signing's own
command makes and verifies the same signatures.

model-signing depends on many packages and takes a second to import, so it is imported only to sign or to verify.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from splitserve.repository.bundle import Bundle, BundleKey
from splitserve.repository.manifest import MANIFEST_FILE, SIGNATURE_FILE, BundleError, NotFetched
from splitserve.repository.routes import Route
from splitserve.repository.source import BundleSource

_INSTALL = 'signatures need more packages ({missing}): pip install "splitserve[signing]"'
_CURVES = "P-256, P-384 or P-521"


class KeyProblem(ValueError):
    """A key cannot be used, or model-signing is not installed; the message says why."""


class NotSigned(NotFetched):
    """A bundle has no signature (yet)."""


class Signer:
    """Signs bundles.

    Args:
        private_key: a file in PEM form with a key on the curve P-256, P-384 or P-521, not encrypted.

    Raises:
        KeyProblem: the file is not such a key, or model-signing is not installed.
    """

    def __init__(self, private_key: Path) -> None:
        try:
            from model_signing import signing
        except ImportError as error:
            raise KeyProblem(_INSTALL.format(missing=error.name)) from error
        with _problems_of(private_key):
            self._config = signing.Config().use_elliptic_key_signer(private_key=private_key)

    def sign(self, bundle: Bundle) -> Path:
        """Check a bundle's files against its manifest and write a signature next to them, replacing an existing one.

        Returns:
            The path of the signature.

        Raises:
            BundleError: a file differs from the manifest, or the signature cannot be written.
        """
        for name in bundle.manifest.files:
            bundle.read(name)
        config = copy.copy(self._config).set_hashing_config(_Contents(bundle))
        target = bundle.folder / SIGNATURE_FILE
        try:
            handle, scratch = tempfile.mkstemp(prefix=f".{bundle.key.version}-", dir=bundle.folder.parent)
            os.close(handle)
            try:
                config.sign(bundle.folder, scratch)
                Path(scratch).chmod(0o644)
                Path(scratch).replace(target)
            finally:
                Path(scratch).unlink(missing_ok=True)
        except OSError as error:
            raise BundleError(f"{SIGNATURE_FILE} cannot be written: {error.strerror}") from error
        return target


class Verifier:
    """Verifies that bundles were signed with the private key that belongs to a public key.

    Args:
        public_key: a file in PEM form with a key on the curve P-256, P-384 or P-521.

    Raises:
        KeyProblem: the file is not such a key, or model-signing is not installed.
    """

    def __init__(self, public_key: Path) -> None:
        try:
            from model_signing import verifying
        except ImportError as error:
            raise KeyProblem(_INSTALL.format(missing=error.name)) from error
        with _problems_of(public_key):
            self._config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)

    def check(self, bundle: Bundle) -> None:
        """Verify a bundle's signature.

        The signed contents are compared with the manifest that was read and with the digests in it. Each file is checked against
        its digest when it is read, so nothing unsigned is used.

        Raises:
            NotSigned: it has no signature.
            BundleError: it was signed with another key, or differs from what was signed.
        """
        signature = bundle.signature()
        if signature is None:
            raise NotSigned(f'not signed; "splitserve sign" adds {SIGNATURE_FILE}')
        contents = _Contents(bundle)
        config = copy.copy(self._config).set_hashing_config(contents)
        try:
            with _file_of(signature) as path:
                config.verify(bundle.folder, path)
        except Exception as error:  # a forged file can make model-signing raise anything
            raise BundleError(f"{SIGNATURE_FILE}: {_verdict(error, contents.digests)}") from error


class SignedBundles:
    """A `BundleSource` that opens only the signed bundles of another one.

    Args:
        source: where the bundles are.
        verifier: for the operator's public key.
    """

    def __init__(self, source: BundleSource, verifier: Verifier) -> None:
        self._source = source
        self._verifier = verifier

    def bundles(self) -> Iterable[BundleKey]:
        return self._source.bundles()

    def route(self, model: str) -> Route | None:
        return self._source.route(model)

    def open(self, key: BundleKey) -> Bundle:
        """As the source, then verify the signature; at that point only the manifest has been read."""
        bundle = self._source.open(key)
        self._verifier.check(bundle)
        return bundle

    def stamp(self, key: BundleKey) -> str:
        return self._source.stamp(key)

    def close(self) -> None:
        self._source.close()


def signed_by(public_key: str, source: BundleSource) -> BundleSource:
    """The source itself, or, if a key file is given, only its signed bundles.

    Raises:
        KeyProblem: the key cannot be used.
    """
    return SignedBundles(source, Verifier(Path(public_key))) if public_key else source


class _Contents:
    """Replaces ``model_signing.hashing.Config``: takes the digests from a bundle's manifest instead of reading the folder.

    So each file is read once, and the bytes that are used are the bytes that were checked.
    """

    def __init__(self, bundle: Bundle) -> None:
        listed = {name: file.sha256 for name, file in bundle.manifest.files.items()}
        self.digests = {**listed, MANIFEST_FILE: bundle.manifest_sha256}
        """Hex digests by file name."""

    def hash(self, model_path: Any, *, files_to_hash: Any = None) -> Any:
        """A ``model_signing.manifest.Manifest``."""
        from model_signing import manifest as signed
        from model_signing._hashing.hashing import Digest

        form = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": [SIGNATURE_FILE]}
        items = [
            signed.FileManifestItem(path=PurePosixPath(name), digest=Digest("sha256", bytes.fromhex(sha256)))
            for name, sha256 in self.digests.items()
        ]
        return signed.Manifest(Path(model_path).name, items, signed.SerializationType.from_args(form))

    def add_ignored_paths(self, *, model_path: Any, paths: Iterable[Any]) -> None:
        """Ignore nothing, whatever the signature requests."""


@contextmanager
def _file_of(data: bytes) -> Iterator[str]:
    """A path to these bytes, in memory where the system supports it: a service may have a read-only file system."""
    if hasattr(os, "memfd_create"):
        with os.fdopen(os.memfd_create(SIGNATURE_FILE), "wb") as file:
            file.write(data)
            file.flush()
            yield f"/proc/self/fd/{file.fileno()}"
    else:
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            yield file.name


@contextmanager
def _problems_of(key: Path) -> Iterator[None]:
    """Turn cryptography's exceptions, which depend on its backend, into `KeyProblem`."""
    try:
        yield
    except AttributeError as error:  # a key of another kind has no curve
        raise KeyProblem(f"{key}: expected a key on the curve {_CURVES}") from error
    except Exception as error:
        raise KeyProblem(f"{key}: {_reason(error)}") from error


def _verdict(error: Exception, files: Iterable[str]) -> str:
    text = str(error)
    if text.startswith("Signature mismatch"):
        differing = [name for name in files if name in text]
        return f"the signed contents differ in {', '.join(differing) or 'that files are missing'}"
    if type(error) is ValueError:
        return _reason(error)
    if type(error).__name__ == "InvalidSignature":
        return "invalid signature"
    return f"not a signature made with a key ({type(error).__name__})"


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) else str(error)
    return " ".join((text or type(error).__name__).split())[:300]
