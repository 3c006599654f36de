"""Signatures of bundles: made with a private key, checked with the public one, by the OpenSSF's model-signing. No network.

A bundle's signature is ``model.sig`` in its folder, in the form that model-signing has for a folder: the digests of all other
files, the manifest among them. It can be added to a published bundle, since it changes nothing of it, and be replaced.
model-signing's own command makes and checks the same signatures.

model-signing brings many packages and takes a second to import: it is imported by those who sign or have signatures checked.
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
    """A key cannot be used, or nothing is installed that could use it; the message says why."""


class NotSigned(NotFetched):
    """A bundle has no signature; it may get one."""


class Signer:
    """Signs bundles.

    Args:
        private_key: a file in PEM form with a key on the curve P-256, P-384 or P-521, not encrypted.

    Raises:
        KeyProblem: there is no such key, or model-signing is not installed.
    """

    def __init__(self, private_key: Path) -> None:
        try:
            from model_signing import signing
        except ImportError as error:
            raise KeyProblem(_INSTALL.format(missing=error.name)) from error
        with _problems_of(private_key):
            self._config = signing.Config().use_elliptic_key_signer(private_key=private_key)

    def sign(self, bundle: Bundle) -> Path:
        """Check a bundle's files against its manifest and put a signature beside them; one that is there is replaced.

        Returns:
            The signature's file.

        Raises:
            BundleError: a file is not what the manifest says, or the signature cannot be written.
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
    """Checks that bundles were signed with the counterpart of a key.

    Args:
        public_key: a file in PEM form with a key on the curve P-256, P-384 or P-521.

    Raises:
        KeyProblem: there is no such key, or model-signing is not installed.
    """

    def __init__(self, public_key: Path) -> None:
        try:
            from model_signing import verifying
        except ImportError as error:
            raise KeyProblem(_INSTALL.format(missing=error.name)) from error
        with _problems_of(public_key):
            self._config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)

    def check(self, bundle: Bundle) -> None:
        """Check a bundle's signature.

        What was signed is compared with the manifest that was read, and with the digests in it, which every file is checked
        against as it is read: so nothing is read that was not signed.

        Raises:
            NotSigned: it has none.
            BundleError: it was signed with another key, or is not what was signed.
        """
        signature = bundle.signature()
        if signature is None:
            raise NotSigned(f'not signed; "splitserve sign" adds {SIGNATURE_FILE}')
        contents = _Contents(bundle)
        config = copy.copy(self._config).set_hashing_config(contents)
        try:
            with _file_of(signature) as path:
                config.verify(bundle.folder, path)
        except Exception as error:  # what a forged file makes model-signing raise is not foreseeable
            raise BundleError(f"{SIGNATURE_FILE}: {_verdict(error, contents.digests)}") from error


class SignedBundles:
    """A `BundleSource` that gives out the bundles of another one, if they are signed.

    Args:
        source: where the bundles are.
        verifier: knows the key.
    """

    def __init__(self, source: BundleSource, verifier: Verifier) -> None:
        self._source = source
        self._verifier = verifier

    def bundles(self) -> Iterable[BundleKey]:
        return self._source.bundles()

    def route(self, model: str) -> Route | None:
        return self._source.route(model)

    def open(self, key: BundleKey) -> Bundle:
        """As the source; nothing but the manifest has been looked at when the signature is checked."""
        bundle = self._source.open(key)
        self._verifier.check(bundle)
        return bundle

    def stamp(self, key: BundleKey) -> str:
        return self._source.stamp(key)

    def close(self) -> None:
        self._source.close()


def signed_by(public_key: str, source: BundleSource) -> BundleSource:
    """The source as it is, or only what of it is signed if a key's file is named.

    Raises:
        KeyProblem: the key cannot be used.
    """
    return SignedBundles(source, Verifier(Path(public_key))) if public_key else source


class _Contents:
    """Stands in for a ``model_signing.hashing.Config``: tells what is in a bundle from its manifest instead of the folder.

    So each file is read once, and what is read is what was checked.
    """

    def __init__(self, bundle: Bundle) -> None:
        listed = {name: file.sha256 for name, file in bundle.manifest.files.items()}
        self.digests = {**listed, MANIFEST_FILE: bundle.manifest_sha256}
        """Hex digests by the name of the file."""

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
        """Nothing is ignored, whatever the signature asks for."""


@contextmanager
def _file_of(data: bytes) -> Iterator[str]:
    """A path that has these bytes, in memory where the system can: a service may have nothing to write to."""
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
    """What cryptography raises, which depends on its backend, as `KeyProblem`."""
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
