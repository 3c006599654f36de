"""``splitserve release``, ``releases`` and ``rollback``: prove, record, list and withdraw releases."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from splitserve.cli.reading import NoRepository, repository_at
from splitserve.cli.tables import print_table
from splitserve.errors import SplitserveError
from splitserve.repository.defaults import said_of_record, said_of_route
from splitserve.repository.manifest import BundleError
from splitserve.repository.release import History, Release
from splitserve.repository.releases import ReleaseReader
from splitserve.repository.writable import writable
from splitserve.versions import UNNAMED

if TYPE_CHECKING:
    from splitserve.publishing.from_bundles import Proposal
    from splitserve.remote.running_model import RunningModel

_NEEDS_PACKAGES = 'releasing needs more packages ({name}): pip install "splitserve[publish]"'


def run(
    model: str,
    pair: str,
    *,
    repository: str,
    rows: Path | None,
    is_written: bool,
    accepts_changed: bool,
    accepts_unknown: bool,
    trusted_modules: list[str],
    allow_environment_mismatch: bool,
    allow_unsafe_pickle: bool,
    predict: str,
) -> int:
    """Prove a pair, show what it would change, and record it if requested; the exit status."""
    try:
        from splitserve.cli.publish import read_data
        from splitserve.publishing.errors import PublishError
        from splitserve.publishing.from_bundles import CHANGED, UNKNOWN, propose
    except ImportError as error:
        print(_NEEDS_PACKAGES.format(name=error.name), file=sys.stderr)
        return 1
    try:
        with _served(predict, model, pair) as server:
            proposal = propose(
                model,
                pair,
                repository=repository,
                rows=read_data(rows) if rows else None,
                trusted_modules=trusted_modules,
                allow_environment_mismatch=allow_environment_mismatch,
                allow_unsafe_pickle=allow_unsafe_pickle,
                server=server,
            )
        _show(proposal)
        if not is_written:
            print("nothing was recorded; --yes records the release")
            return 0
        release = proposal.record([CHANGED] * accepts_changed + [UNKNOWN] * accepts_unknown)
    except PublishError as error:
        print(error, file=sys.stderr)
        return 1
    except SplitserveError as error:
        print(f"{predict}: {error.message}", file=sys.stderr)
        return 1
    print(f"released {model} {pair} as release {release.sequence}")
    _say_consequences(release, repository)
    return 0


def _served(predict: str, model: str, pair: str) -> AbstractContextManager[RunningModel | None]:
    """The model at the predict server of this address; none if no address is given."""
    if not predict:
        return nullcontext()
    from splitserve.cli.connection import connect
    from splitserve.remote.running_model import RunningModel

    version = pair.rpartition(".")[2]
    return RunningModel(connect(predict, stage="predict"), model, "" if version == str(UNNAMED) else version)


def _show(proposal: Proposal) -> None:
    print(f"{proposal.model} {proposal.pair}: the halves fit; {proposal.n_rows} rows compared alone, together and permuted")
    if proposal.features is None:
        print("features: unknown what the predictor was trained on")
    elif proposal.features:
        print(f"features that differ from those trained on: {len(proposal.features)}")
        for difference in proposal.features[:20]:
            print(f"  {difference}")
    else:
        print("features: equal to those trained on")
    current = proposal.current
    if current is None:
        print("no release serves now that takes the same rows")
        return
    print(
        f"against release {current.release.sequence} ({current.release.pair}), on its {current.n_rows} golden rows: "
        f"labels that change: {current.n_labels_changed}"
    )
    for output, change in current.changes.items():
        print(f'  output "{output}": largest change {change:.3g}')


def run_withdraw(model: str, sequence: str, *, repository: str) -> int:
    """Take a release back; the exit status."""
    if not sequence.isdecimal():
        print(f'"{sequence}": expected the sequence number of a release; splitserve releases {model} lists them', file=sys.stderr)
        return 1
    try:
        from splitserve.publishing.errors import PublishError
        from splitserve.publishing.from_bundles import withdraw
    except ImportError as error:
        print(_NEEDS_PACKAGES.format(name=error.name), file=sys.stderr)
        return 1
    try:
        record = withdraw(model, int(sequence), repository=repository)
    except PublishError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"withdrew release {record.manifest.withdraws} of {model} ({record.pair}); recorded as {record.sequence}")
    _say_consequences(record, repository)
    return 0


def run_rollback(model: str, *, repository: str) -> int:
    """Release again what served before; the exit status."""
    try:
        from splitserve.publishing.errors import PublishError
        from splitserve.publishing.from_bundles import rollback
    except ImportError as error:
        print(_NEEDS_PACKAGES.format(name=error.name), file=sys.stderr)
        return 1
    try:
        record = rollback(model, repository=repository)
    except PublishError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"rolled {model} back from release {record.manifest.rolls_back} to {record.pair}, as release {record.sequence}")
    _say_consequences(record, repository)
    return 0


def _say_consequences(record: Release, repository: str) -> None:
    """What serves after a record was added, where that may surprise."""
    sys.stdout.flush()
    for line in said_of_record(writable(repository), record):
        print(line, file=sys.stderr)


def run_list(model: str, where: str) -> int:
    """List the records of a model's releases; the exit status. Reads no bundle, so it needs no more than the command."""
    try:
        source = repository_at(where)
        list(source.bundles())
        reader = ReleaseReader(source)
        history = reader.history(model)
    except (BundleError, NoRepository) as error:
        print(error, file=sys.stderr)
        return 1
    for problem in reader.problems.get(model, ()):
        print(problem, file=sys.stderr)
    if not history.records:
        print(f"{model}: no releases in {where}; splitserve release {model} K.M records one", file=sys.stderr)
        return 1
    print_table(("release", "pair", "when", "proven by", "accepted", "state"), _rows(history))
    if said := said_of_route(source, model, history):
        sys.stdout.flush()
        print(said, file=sys.stderr)
    return int(bool(reader.problems.get(model)))


def _rows(history: History) -> Iterator[tuple[str, ...]]:
    current = history.current()
    for record in history.records:
        manifest = record.manifest
        if manifest.withdraws:
            state = f"withdraws {manifest.withdraws}"
        elif record.sequence in history.withdrawn:
            state = "withdrawn"
        else:
            state = "current" if record is current else ""
        if manifest.rolls_back:
            state = ", ".join(filter(None, (state, f"rolls back {manifest.rolls_back}")))
        proven = "" if manifest.withdraws else manifest.proven
        yield str(record.sequence), manifest.pair, manifest.created, proven, ", ".join(manifest.accepted), state
