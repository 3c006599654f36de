"""``splitserve verify``: the golden rows of releases through a running system."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing

from splitserve.checks.verify import Outcome, ServerUnderTest, verify
from splitserve.cli.connection import client
from splitserve.cli.reading import NoRepository, repository_at
from splitserve.cli.tables import print_table
from splitserve.errors import SplitserveError
from splitserve.repository.manifest import BundleError
from splitserve.repository.source import BundleSource
from splitserve.versions import parse_pair


def run(url: str, models: Sequence[str], *, where: str, version: str, timeout_s: float) -> int:
    """Print a row for each pair, and the worst difference of each that differs; 1 if one differs or there is none."""
    try:
        source = repository_at(where)
        published = sorted({key.model for key in source.bundles()})
        names = list(models) or published
        if not names:
            print(f"no models found in {where}", file=sys.stderr)
            return 1
        with closing(client(url, timeout_s=timeout_s)) as server:
            outcomes = [outcome for model in names for outcome in _verify(source, server, model, version)]
    except (BundleError, NoRepository) as error:
        print(error, file=sys.stderr)
        return 1
    print_table(("model", "pair", "release", "rows", "result"), map(_row, outcomes))
    sys.stdout.flush()
    for outcome in outcomes:
        if outcome.problem:
            print(f"{outcome.model} {outcome.pair}".strip() + f": {outcome.problem}", file=sys.stderr)
    return int(any(outcome.problem for outcome in outcomes))


def _verify(source: BundleSource, server: ServerUnderTest, model: str, version: str) -> list[Outcome]:
    try:
        return verify(source, server, model, parse_pair(model, version))
    except SplitserveError as error:
        return [Outcome(model, version, problem=error.message)]


def _row(outcome: Outcome) -> tuple[str, ...]:
    result = "agrees" if not outcome.problem else "differs" if outcome.worst else "failed"
    return outcome.model, outcome.pair, str(outcome.sequence or "-"), str(outcome.n_rows or "-"), result
