"""``splitserve sign``: signatures of the bundles, releases and routes of a model repository."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from splitserve.repository.folder import Repository
from splitserve.repository.manifest import BundleError
from splitserve.repository.release import ReleaseKey
from splitserve.repository.signing import KeyProblem, Signer
from splitserve.repository.source import load_bundle

_Signing = tuple[str, Callable[[], Path]]
"""What is signed, and what signs it."""


def run(root: Path, key: Path, models: Sequence[str]) -> int:
    """Sign all of these models, of all models if none is named; 1 if the key or a bundle, release or route cannot be used."""
    repository = Repository(root)
    try:
        signer = Signer(key)
        signings = list(_signings(repository, signer, _models(repository, models)))
    except (KeyProblem, BundleError) as error:
        print(error, file=sys.stderr)
        return 1
    outcomes = [_sign(*each) for each in signings]
    return int(not all(outcomes))


def _models(repository: Repository, models: Sequence[str]) -> set[str]:
    """Raises:
    BundleError: there are no bundles, or none of one of the models.
    """
    found = {key.model for key in repository.bundles()}
    if missing := sorted(set(models) - found):
        raise BundleError(f"requested models not in repository {repository.root}: {', '.join(missing)}")
    if not found:
        raise BundleError(f"no models found in {repository.root}")
    return set(models) or found


def _signings(repository: Repository, signer: Signer, models: set[str]) -> Iterator[_Signing]:
    """All that is to be signed: bundles first, so that no signed release names one that is not."""
    for bundle in repository.bundles():
        if bundle.model in models:
            yield str(bundle), partial(load_bundle, repository, bundle, signer.sign)
    for model in sorted(models):
        for record in repository.releases(model):
            yield str(record), partial(_sign_record, repository, signer, record)
        if (stored := repository.read_route(model)) is not None:
            file = repository.route_file(model)
            yield f"{model}/{file.name}", partial(signer.sign_route, model, file, stored.data)


def _sign_record(repository: Repository, signer: Signer, key: ReleaseKey) -> Path:
    return signer.sign(repository.open_release(key))


def _sign(what: str, sign: Callable[[], Path]) -> bool:
    try:
        print(f"{what}: {sign()}")
    except BundleError as error:
        print(error if str(error).startswith(what) else f"{what}: {error}", file=sys.stderr)
        return False
    return True
