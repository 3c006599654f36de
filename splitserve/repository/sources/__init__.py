"""Sources of bundles: a folder, a URL behind a cache, or versions of MLflow's model registry.

The packages for URLs are imported only when a URL is used, so that a service with a folder starts without them.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from splitserve.repository.selection import Selection
from splitserve.repository.source import BundleSource
from splitserve.repository.sources.local_folder import LocalFolder

FETCH_TIMEOUT_S = 60.0

_NEEDS = {
    "s3": ("s3fs", "s3"),
    "gs": ("gcsfs", "gcs"),
    "az": ("adlfs", "azure"),
    "http": ("aiohttp", "http"),
    "https": ("aiohttp", "http"),
}
"""By scheme: the package that it needs, and the extra of splitserve that installs it."""


MLFLOW = "mlflow:"
"""Begins the names of versions in MLflow's model registry."""


def is_url(where: str) -> bool:
    """Whether a model repository is a URL, or in MLflow's registry; otherwise it is a folder."""
    return where.startswith(MLFLOW) or ("://" in where and not where.startswith("file://"))


def check(where: str) -> None:
    """Check that this installation can read a model repository, without connecting to it.

    Raises:
        ValueError: the scheme is unknown, its packages are not installed, or MLflow's variables name no server.
    """
    if not is_url(where):
        return
    if where.startswith(MLFLOW):
        for package in ("httpx", "fsspec"):
            _require(MLFLOW, package, "registry")
        from splitserve.repository.sources import mlflow_server

        mlflow_server.parse(where)
        mlflow_server.server_uris(os.environ)
        return
    scheme, _, rest = where.partition("://")
    if scheme not in _NEEDS:
        raise ValueError(f"expected a folder or a URL with {', '.join(f'{name}://' for name in _NEEDS)}; got {scheme}://")
    if not rest.strip("/"):
        raise ValueError(f"{where}: expected a {'host' if scheme.startswith('http') else 'bucket'} after {scheme}://, got none")
    _require(f"{scheme}://", *_NEEDS[scheme])


def _require(scheme: str, package: str, extra: str) -> None:
    """Raises:
    ValueError: the package that a scheme needs is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f'{scheme} needs more packages ({package}): pip install "splitserve[{extra}]", '
            f"or an image that was built with --build-arg EXTRAS={extra}"
        )


def missing(where: str) -> str:
    """Why there can be nothing in a model repository: its folder does not exist. "" for a URL, which may answer later."""
    if is_url(where):
        return ""
    folder = Path(_folder(where))
    return "" if folder.is_dir() else f"{folder}: expected a folder, which may be empty; it does not exist"


def _folder(where: str) -> str:
    return unquote(urlsplit(where).path) if where.startswith("file://") else where


def count_cached(where: str, cache: str) -> int:
    """Bytes in the cache of a model repository; 0 for a folder, which needs none.

    Args:
        where: the model repository.
        cache: as for `source_of`.
    """
    if not is_url(where):
        return 0
    from splitserve.repository.sources.cache import Cache

    return Cache(Path(cache) if cache else None).count_bytes()


def source_of(
    where: str | os.PathLike[str],
    *,
    cache: str = "",
    timeout_s: float = FETCH_TIMEOUT_S,
    selection: Selection | None = None,
) -> BundleSource:
    """The source for a model repository. It connects when it is first used.

    Args:
        where: a folder (`LocalFolder`), a URL, or versions in MLflow's registry.
        cache: folder for fetched files; the user's cache folder if empty.
        timeout_s: of each step of a fetch: a listing, or one range of a file.
        selection: models to list; a URL lists no others.

    Raises:
        ValueError: as `check`.
    """
    where = os.fspath(where)
    check(where)
    if not is_url(where):
        return LocalFolder(_folder(where))
    from splitserve.repository.sources.cache import Cache
    from splitserve.repository.sources.remote_folder import RemoteFolder
    from splitserve.repository.sources.remote_repository import RemoteRepository

    files, serves = Cache(Path(cache) if cache else None, patience_s=2 * timeout_s), (selection or Selection()).serves
    if where.startswith(MLFLOW):
        from splitserve.repository.sources import mlflow_server, registered_models

        uris = mlflow_server.server_uris(os.environ)
        return registered_models.connect(mlflow_server.parse(where), uris, files, serves=serves, timeout_s=timeout_s)
    return RemoteRepository(RemoteFolder(where, timeout_s=timeout_s), files, serves=serves)
