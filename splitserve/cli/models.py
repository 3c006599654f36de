"""``splitserve models``: what is in a model repository, and what of it is released."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from splitserve.cli.reading import NoRepository, repository_at
from splitserve.cli.tables import print_table
from splitserve.repository.bundle import BundleKey
from splitserve.repository.defaults import said_of_route
from splitserve.repository.manifest import BundleError
from splitserve.repository.release import History
from splitserve.repository.releases import ReleaseReader
from splitserve.repository.source import BundleSource
from splitserve.signature import TensorSpec


def run(where: str) -> int:
    """Print a row for each bundle, and one for each model; 1 if a manifest or a record is broken."""
    try:
        source = repository_at(where)
        keys = list(source.bundles())
        rows = [_row(source, key) for key in keys]
        reader = ReleaseReader(source)
        names = sorted({*(key.model for key in keys), *source.released_models()})
        models = {name: reader.history(name) for name in names}
    except (BundleError, NoRepository) as error:
        print(error, file=sys.stderr)
        return 1
    if not models:
        print(f"no models found in {where}")
        return 0
    if rows:
        print_table(("model", "half", "version", "inputs", "outputs", "made with"), [cells for cells, _ in rows])
        print()
    print_table(
        ("model", "release", "pair", "earlier releases", "without a release"),
        [_released(model, history, [key for key in keys if key.model == model]) for model, history in models.items()],
    )
    for said in filter(None, (said_of_route(source, model, history) for model, history in models.items())):
        print(said, file=sys.stderr)
    problems = [problem for each in reader.problems.values() for problem in each]
    for problem in problems:
        print(problem, file=sys.stderr)
    return int(any(is_broken for _, is_broken in rows) or bool(problems))


def _released(model: str, history: History, keys: Sequence[BundleKey]) -> tuple[str, ...]:
    """The current release of a model, and its versions that no release names."""
    current = history.current()
    pairs = history.by_pair()
    named = {("preprocess", pair.preprocessor) for pair in pairs} | {("predict", pair.predictor) for pair in pairs}
    others = ", ".join(f"{key.kind} {key.version}" for key in keys if (key.kind, key.version) not in named)
    if current is None:
        return model, "none", "-", "-", others
    earlier = ", ".join(f"{each.sequence} ({each.pair})" for each in history.active() if each is not current)
    return model, str(current.sequence), str(current.pair), earlier or "-", others or "-"


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
