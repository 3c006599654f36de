"""``splitserve sign``: signatures of the bundles, releases and routes of a model repository."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from splitserve.repository.bundle import BundleKey
from splitserve.repository.manifest import BundleError
from splitserve.repository.release import ReleaseKey
from splitserve.repository.routes import ROUTE_FILE
from splitserve.repository.signing import Signer
from splitserve.repository.source import fetch_bundle
from splitserve.repository.writable import WritableRepository, writable

_Signing = tuple[str, Callable[[], str | Path]]
"""What is signed, and what signs it."""


def run(where: str | Path, key: Path, models: Sequence[str]) -> int:
    """Sign all of these models, of all models if none is named; 1 if the key or a bundle, release or route cannot be used."""
    try:
        repository = writable(where)
        signer = Signer(key)
        signings = list(_signings(repository, signer, _models(where, repository, models)))
    except (ValueError, BundleError) as error:
        print(error, file=sys.stderr)
        return 1
    outcomes = [_sign(*each) for each in signings]
    return int(not all(outcomes))


def _models(where: str | Path, repository: WritableRepository, models: Sequence[str]) -> set[str]:
    """Raises:
    BundleError: there is nothing to sign, or nothing of one of the models.
    """
    found = {*(key.model for key in repository.bundles()), *repository.released_models()}
    if missing := sorted(set(models) - found):
        raise BundleError(f"requested models not in repository {where}: {', '.join(missing)}")
    if not found:
        raise BundleError(f"no models found in {where}")
    return set(models) or found


def _signings(repository: WritableRepository, signer: Signer, models: set[str]) -> Iterator[_Signing]:
    """All that is to be signed: bundles first, so that no signed release names one that is not."""
    for bundle in repository.bundles():
        if bundle.model in models:
            yield str(bundle), partial(_sign_bundle, repository, signer, bundle)
    for model in sorted(models):
        for record in repository.releases(model):
            yield str(record), partial(_sign_record, repository, signer, record)
        if (stored := repository.read_route(model)) is not None:
            sign_route = partial(signer.sign_route, model, data=stored.data)
            yield f"{model}/{ROUTE_FILE}", partial(repository.add_route_signature, model, sign_route)


def _sign_bundle(repository: WritableRepository, signer: Signer, key: BundleKey) -> str | Path:
    return repository.add_signature(key, signer.sign(fetch_bundle(repository, key)))


def _sign_record(repository: WritableRepository, signer: Signer, key: ReleaseKey) -> str | Path:
    return repository.add_signature(key, signer.sign(repository.open_release(key)))


def _sign(what: str, sign: Callable[[], str | Path]) -> bool:
    try:
        print(f"{what}: {sign()}")
    except BundleError as error:
        print(error if str(error).startswith(what) else f"{what}: {error}", file=sys.stderr)
        return False
    return True
