"""``splitserve models``: what is in a model repository."""

from __future__ import annotations

import sys

from splitserve.cli.reading import NoRepository, repository_at
from splitserve.cli.tables import print_table
from splitserve.repository.bundle import BundleKey
from splitserve.repository.manifest import BundleError
from splitserve.repository.source import BundleSource
from splitserve.signature import TensorSpec


def run(where: str) -> int:
    """Print a row for each bundle; 1 if a manifest is broken."""
    try:
        source = repository_at(where)
        rows = [_row(source, key) for key in source.bundles()]
    except (BundleError, NoRepository) as error:
        print(error, file=sys.stderr)
        return 1
    if not rows:
        print(f"no models found in {where}")
        return 0
    print_table(("model", "half", "version", "inputs", "outputs", "made with"), [cells for cells, _ in rows])
    return int(any(is_broken for _, is_broken in rows))


def _row(source: BundleSource, key: BundleKey) -> tuple[tuple[str, ...], bool]:
    start = (key.model, key.kind, str(key.version))
    try:
        manifest = source.open(key).manifest
    except BundleError as error:
        return (*start, f"broken: {error}", "", ""), True
    library = "scikit-learn" if key.kind == "preprocess" else "ONNX IR"
    made_with = f"{library} {manifest.environment.get(library, '?')}"
    return (*start, _shown(manifest.inputs), _shown(manifest.outputs), made_with), False


def _shown(specs: tuple[TensorSpec, ...]) -> str:
    shown = [f"{spec.name} {spec.datatype} {list(spec.wire_shape)}" for spec in specs[:2]]
    return ", ".join(shown) + (f" and {len(specs) - 2} more" if len(specs) > 2 else "")
