"""Signatures of bundles: made with a private key, verified with the public one, by the OpenSSF's model-signing. No network.

The signature of a bundle or release is ``model.sig`` in its folder, in the form that model-signing has for a folder: the digests
of all other files, the manifest among them. It can be added to what is published, since it changes nothing of it, and be
replaced. model-signing's own command makes and checks the same signatures. A route's is ``route.sig`` beside it: it signs the
path ``MODEL/route.json``, so that it is not valid for another model.

model-signing depends on many packages and takes a second to import, so it is imported only to sign or to verify.
"""

from __future__ import annotations

import copy
import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from splitserve.repository import routes
from splitserve.repository.bundle import Bundle, BundleKey
from splitserve.repository.manifest import MANIFEST_FILE, SIGNATURE_FILE, BundleError, NotSigned
from splitserve.repository.manifest_folder import ManifestFolder
from splitserve.repository.release import ReleaseKey
from splitserve.repository.release_log import SCRATCH_PREFIX
from splitserve.repository.releases import ReleaseFolder
from splitserve.repository.routes import ROUTE_FILE, ROUTE_SIGNATURE_FILE, Route, StoredRoute
from splitserve.repository.source import BundleSource

_INSTALL = 'signatures need more packages ({missing}): pip install "splitserve[signing]"'
_CURVES = "P-256, P-384 or P-521"


class KeyProblem(ValueError):
    """A key cannot be used, or model-signing is not installed; the message says why."""


class Signer:
    """Signs bundles, releases and routes.

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

    def sign(self, bundle: ManifestFolder[Any, Any]) -> Path:
        """Check files of a bundle or release against its manifest and write a signature next to them; an existing one is
        replaced.

        Returns:
            The path of the signature.

        Raises:
            BundleError: a file differs from the manifest, or the signature cannot be written.
        """
        for name in bundle.listed:
            bundle.read(name)
        return self._sign(bundle.folder, _Contents.of(bundle), bundle.folder / SIGNATURE_FILE, bundle.folder.parent)

    def sign_route(self, model: str, file: Path, data: bytes) -> Path:
        """Write a signature next to a model's route; an existing one is replaced.

        Args:
            model: whose route.
            file: where it is.
            data: its bytes.

        Returns:
            The signature's file.

        Raises:
            BundleError: the signature cannot be written.
        """
        return self._sign(file.parent, _Contents.of_route(model, data), file.with_name(ROUTE_SIGNATURE_FILE), file.parent)

    def _sign(self, folder: Path, contents: _Contents, target: Path, scratch_folder: Path) -> Path:
        config = copy.copy(self._config).set_hashing_config(contents)
        try:
            handle, scratch = tempfile.mkstemp(prefix=f"{SCRATCH_PREFIX}{folder.name}-", dir=scratch_folder)
            os.close(handle)
            try:
                config.sign(folder, scratch)
                Path(scratch).chmod(0o644)
                Path(scratch).replace(target)
            finally:
                Path(scratch).unlink(missing_ok=True)
        except OSError as error:
            raise BundleError(f"{target.name} cannot be written: {error.strerror}") from error
        return target


class Verifier:
    """Checks that bundles, releases and routes were signed with the counterpart of a key.

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

    def check(self, bundle: ManifestFolder[Any, Any]) -> None:
        """Check the signature of a bundle or release.

        The signed contents are compared with the manifest that was read and with the digests in it. Each file is checked against
        its digest when it is read, so nothing unsigned is used.

        Raises:
            NotSigned: it has no signature.
            BundleError: it was signed with another key, or differs from what was signed.
        """
        self._check(bundle.folder, _Contents.of(bundle), bundle.signature(), SIGNATURE_FILE)

    def check_route(self, model: str, stored: StoredRoute) -> None:
        """Check the signature of a model's route.

        Raises:
            NotSigned: it has none.
            BundleError: it was signed with another key, or is not what was signed.
        """
        self._check(Path(model), _Contents.of_route(model, stored.data), stored.signature, ROUTE_SIGNATURE_FILE)

    def _check(self, folder: Path, contents: _Contents, signature: bytes | None, name: str) -> None:
        if signature is None:
            raise NotSigned(f'not signed; "splitserve sign" adds {name}')
        config = copy.copy(self._config).set_hashing_config(contents)
        try:
            with _file_of(signature) as path:
                config.verify(folder, path)
        except Exception as error:  # what a forged file makes model-signing raise is not foreseeable
            raise BundleError(f"{name}: {_verdict(error, contents.digests)}") from error


class SignedBundles:
    """A `BundleSource` with the signed bundles, releases and routes of another one.

    Args:
        source: where they are.
        verifier: knows the key.
    """

    def __init__(self, source: BundleSource, verifier: Verifier) -> None:
        self._source = source
        self._verifier = verifier

    def bundles(self) -> Iterable[BundleKey]:
        return self._source.bundles()

    def route(self, model: str) -> Route | None:
        return routes.decode_for(model, self.read_route(model))

    def read_route(self, model: str) -> StoredRoute | None:
        """As the source; its signature is checked before anything is made of it."""
        stored = self._source.read_route(model)
        try:
            if stored is not None:
                self._verifier.check_route(model, stored)
        except BundleError as error:
            raise type(error)(f"{model}: {ROUTE_FILE}: {error}") from error
        return stored

    def released_models(self) -> list[str]:
        return self._source.released_models()

    def releases(self, model: str) -> list[ReleaseKey]:
        return self._source.releases(model)

    def open_release(self, key: ReleaseKey) -> ReleaseFolder:
        """As the source; nothing but the manifest has been read when the signature is checked."""
        record = self._source.open_release(key)
        self._verifier.check(record)
        return record

    def open(self, key: BundleKey) -> Bundle:
        """As the source, then verify the signature; at that point only the manifest has been read."""
        bundle = self._source.open(key)
        self._verifier.check(bundle)
        return bundle

    def stamp(self, key: BundleKey | ReleaseKey, /) -> str:
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
    """Stands in for a ``model_signing.hashing.Config``: takes a folder's contents from its manifest instead of the files.

    So each file is read once, and the bytes that are used are the bytes that were checked.
    """

    def __init__(self, digests: dict[str, str]) -> None:
        self.digests = digests
        """Hex digests by the name of the file."""

    @classmethod
    def of(cls, folder: ManifestFolder[Any, Any]) -> _Contents:
        """Of a bundle or release."""
        listed = {name: file.sha256 for name, file in folder.listed.items()}
        return cls({**listed, MANIFEST_FILE: folder.manifest_sha256})

    @classmethod
    def of_route(cls, model: str, data: bytes) -> _Contents:
        """Of a route: its path names the model."""
        return cls({f"{model}/{ROUTE_FILE}": hashlib.sha256(data).hexdigest()})

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
        """Ignore nothing, even if the signature requests it."""


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
