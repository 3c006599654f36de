"""Bundles without a model, for tests of what stores and transfers them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from splitserve.repository.bundle import Bundle, BundleKey
from splitserve.repository.folder import Repository
from splitserve.repository.manifest import Manifest

KEY = BundleKey("m", "predict", 1)

GRAPH = {"model.onnx": b"graph"}


def manifest_of(key: BundleKey = KEY) -> Manifest:
    """A manifest without inputs and outputs."""
    return Manifest(
        schema_version=1,
        name=key.model,
        kind=key.kind,
        version=key.version,
        created="2026-01-02T03:04:05+00:00",
        files={},
        inputs=(),
        outputs=(),
        environment={},
    )


def write_bundle(repository: Repository, key: BundleKey = KEY, files: Mapping[str, bytes] = GRAPH) -> Bundle:
    """Write a bundle with these files."""
    return repository.write(manifest_of(key), files)


def write_route(repository: Repository, model: str = "m", pair: str = "1.1") -> Path:
    """Write the route of a model."""
    path = repository.root / model / "route.json"
    path.write_text(f'{{"pairs": [{{"pair": "{pair}"}}]}}')
    return path
