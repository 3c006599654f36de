"""``splitserve sign``: signatures beside the bundles of a model repository."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from splitserve.repository.bundle import BundleKey
from splitserve.repository.folder import Repository
from splitserve.repository.manifest import BundleError
from splitserve.repository.signing import KeyProblem, Signer
from splitserve.repository.source import load_bundle


def run(root: Path, key: Path, models: Sequence[str]) -> int:
    """Sign every bundle of these models, of all if none is named; 1 if the key or one of the bundles is no good."""
    repository = Repository(root)
    try:
        signer = Signer(key)
        bundles = _bundles(repository, models)
    except (KeyProblem, BundleError) as error:
        print(error, file=sys.stderr)
        return 1
    outcomes = [_sign(repository, signer, each) for each in bundles]
    return int(not all(outcomes))


def _bundles(repository: Repository, models: Sequence[str]) -> list[BundleKey]:
    """Raises:
    BundleError: there are none, or none of one of the models.
    """
    found = [key for key in repository.bundles() if not models or key.model in models]
    if missing := sorted(set(models) - {key.model for key in found}):
        raise BundleError(f"requested models not in repository {repository.root}: {', '.join(missing)}")
    if not found:
        raise BundleError(f"no models found in {repository.root}")
    return found


def _sign(repository: Repository, signer: Signer, key: BundleKey) -> bool:
    try:
        print(f"{key}: {load_bundle(repository, key, signer.sign)}")
    except BundleError as error:
        print(error, file=sys.stderr)
        return False
    return True
