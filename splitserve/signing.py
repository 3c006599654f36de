"""Signatures of bundles: made with a private key, checked with the public one, by the OpenSSF's model-signing. No network.

A bundle's signature is ``model.sig`` in its folder, in the form that model-signing has for a folder: the digests of all other
files, the manifest among them. It can be added to a published bundle, since it changes nothing of it, and be replaced.

model-signing brings many packages and takes a second to import: it is imported by those who sign or have signatures checked.
"""

from __future__ import annotations

import copy
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from splitserve import manifest as manifests
from splitserve.manifest import MANIFEST_FILE, BundleError, Manifest, NotFetched
from splitserve.repository import Bundle

SIGNATURE_FILE = "model.sig"
SIGNATURE_BYTES_MAX = 1024 * 1024

_INSTALL = 'signatures need more packages ({missing}): pip install "splitserve[signing]"'


class KeyProblem(ValueError):
    """A key can not be used, or nothing is installed that could use it; the message says why."""


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
        try:
            self._config = signing.Config().use_elliptic_key_signer(private_key=private_key)
        except Exception as error:  # cryptography raises what its backend happens to
            raise KeyProblem(f"{private_key}: {_reason(error)}") from error

    def sign(self, bundle: Bundle) -> Path:
        """Check a bundle's files against its manifest and put a signature beside them; one that is there is replaced.

        Returns:
            The signature's file.

        Raises:
            BundleError: a file is not what the manifest says, or the signature can not be written.
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
            raise BundleError(f"{bundle.key}: {SIGNATURE_FILE} can not be written: {error.strerror}") from error
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
        try:
            self._config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
        except Exception as error:
            raise KeyProblem(f"{public_key}: {_reason(error)}") from error

    def check(self, bundle: Bundle) -> None:
        """Check a bundle's signature.

        What was signed is compared with the manifest that was read, and with the digests in it, which every file is checked
        against as it is read: so nothing is read that was not signed.

        Raises:
            NotSigned: it has none.
            BundleError: it was signed with another key, or is not what was signed.
        """
        signature = bundle.folder / SIGNATURE_FILE
        _check_is_small_file(signature)
        config = copy.copy(self._config).set_hashing_config(_Contents(bundle))
        try:
            config.verify(bundle.folder, signature)
        except Exception as error:  # what a forged file makes model-signing raise is not foreseeable
            raise BundleError(f"{SIGNATURE_FILE}: {_verdict(error)}") from error


class _Contents:
    """Stands in for a ``model_signing.hashing.Config``: tells what is in a bundle from its manifest instead of the folder."""

    def __init__(self, bundle: Bundle) -> None:
        manifest_bytes = _read_manifest(bundle)
        listed = {name: file.sha256 for name, file in bundle.manifest.files.items()}
        self._digests = {**listed, MANIFEST_FILE: hashlib.sha256(manifest_bytes).hexdigest()}

    def hash(self, model_path: Any, *, files_to_hash: Any = None) -> Any:
        """A ``model_signing.manifest.Manifest``."""
        from model_signing import manifest as signed
        from model_signing._hashing.hashing import Digest

        form = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": [SIGNATURE_FILE]}
        items = [
            signed.FileManifestItem(path=PurePosixPath(name), digest=Digest("sha256", bytes.fromhex(sha256)))
            for name, sha256 in self._digests.items()
        ]
        return signed.Manifest(Path(model_path).name, items, signed.SerializationType.from_args(form))

    def add_ignored_paths(self, *, model_path: Any, paths: Iterable[Any]) -> None:
        """Nothing is ignored, whatever the signature asks for."""


def _read_manifest(bundle: Bundle) -> bytes:
    """The bytes of the manifest that the bundle has.

    Raises:
        BundleError: the file is not there any more, or is another one by now.
    """
    try:
        data = (bundle.folder / MANIFEST_FILE).read_bytes()
    except OSError as error:
        raise BundleError(f"{MANIFEST_FILE} can not be read: {error.strerror}") from None
    found: Manifest = manifests.decode(data)
    if found != bundle.manifest:
        raise BundleError(f"{MANIFEST_FILE} was changed while the bundle was read")
    return data


def _check_is_small_file(path: Path) -> None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        raise NotSigned(f'it is not signed; "splitserve sign" adds a {SIGNATURE_FILE}') from None
    except OSError as error:
        raise BundleError(f"{SIGNATURE_FILE} can not be read: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode) or found.st_size > SIGNATURE_BYTES_MAX:
        raise BundleError(f"{SIGNATURE_FILE}: expected a file of at most {SIGNATURE_BYTES_MAX} bytes")


def _verdict(error: Exception) -> str:
    if type(error) is ValueError:
        return _reason(error)
    if type(error).__name__ == "InvalidSignature":
        return "was changed after it was made"
    return f"not a signature by a key ({type(error).__name__})"


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) else str(error)
    return " ".join((text or type(error).__name__).split())[:300]
