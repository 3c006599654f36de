"""Keys for tests that sign bundles."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric import ec


class Keys(NamedTuple):
    """Files with the two halves of a key."""

    private: Path
    public: Path


def make_keys(folder: Path, name: str = "key", key: Any = None, password: bytes | None = None) -> Keys:
    """Write a key in PEM form; a new one on P-256 by default."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    lock = form.BestAvailableEncryption(password) if password else form.NoEncryption()
    keys = Keys(folder / f"{name}.pem", folder / f"{name}.pub.pem")
    keys.private.write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, lock))
    keys.public.write_bytes(key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo))
    return keys
