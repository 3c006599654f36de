"""``splitserve models``: what is in a model repository."""

from __future__ import annotations

import sys
from pathlib import Path

from splitserve.cli.tables import print_table
from splitserve.manifest import BundleError
from splitserve.repository import BundleKey, Repository
from splitserve.signature import TensorSpec


def run(root: Path) -> int:
    """Print a row for each bundle; 1 if a manifest is broken."""
    if not root.is_dir():
        print(f"{root}: no such folder", file=sys.stderr)
        return 1
    repository = Repository(root)
    rows = [_row(repository, key) for key in repository.bundles()]
    if not rows:
        print(f"{root} holds no models")
        return 0
    print_table(("model", "half", "version", "inputs", "outputs", "made with"), [cells for cells, _ in rows])
    return int(any(is_broken for _, is_broken in rows))


def _row(repository: Repository, key: BundleKey) -> tuple[tuple[str, ...], bool]:
    start = (key.model, key.kind, str(key.version))
    try:
        manifest = repository.open(key).manifest
    except BundleError as error:
        return (*start, f"broken: {error}", "", ""), True
    library = "scikit-learn" if key.kind == "preprocess" else "ONNX IR"
    made_with = f"{library} {manifest.environment.get(library, '?')}"
    return (*start, _shown(manifest.inputs), _shown(manifest.outputs), made_with), False


def _shown(specs: tuple[TensorSpec, ...]) -> str:
    shown = [f"{spec.name} {spec.datatype} {list(spec.wire_shape)}" for spec in specs[:2]]
    return ", ".join(shown) + (f" and {len(specs) - 2} more" if len(specs) > 2 else "")
