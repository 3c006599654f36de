"""``python -m benchmarks own``, ``peers``, ``jobs``, ``batch`` and ``soak``."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import msgspec

from benchmarks import batch, jobs, loads, own, report, side_by_side, soak, systems
from benchmarks.machine import Machine, this_machine
from benchmarks.processes import BenchmarkError


def main() -> None:
    arguments = _parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # an exit, so that what was started is stopped
    if arguments.run not in (_soak, _batch) and (missing := loads.missing_tools()):
        sys.exit(f"missing: {', '.join(missing)}")
    try:
        n_failed = arguments.run(arguments)
    except BenchmarkError as error:
        sys.exit(str(error))
    if n_failed:
        sys.exit(f"{n_failed} failures under load; the tables show where")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Benchmarks; see benchmarks/README.md.")
    commands = parser.add_subparsers(required=True)

    command = commands.add_parser("own", help="our services alone")
    command.set_defaults(run=_own)
    defaults = own.OwnOptions()
    command.add_argument("--models", nargs="+", choices=own.MODELS, default=defaults.models)
    command.add_argument("--protocols", nargs="+", choices=own.PROTOCOLS, default=defaults.protocols)
    command.add_argument("--concurrency", nargs="+", type=int, default=defaults.concurrency, help="requests in flight")
    command.add_argument("--systems", nargs="+", choices=defaults.systems, default=defaults.systems)
    command.add_argument("--rates", nargs="*", type=float, default=defaults.rates, help="of the open loop, parts of the highest")
    command.add_argument("--cold-starts", type=int, default=defaults.n_cold_starts, help="how often; 0: not at all")
    command.add_argument("--imagenet", type=Path, default=defaults.imagenet, help="repository that has the picture model")
    _add_common(command, seconds=defaults.seconds, rounds=defaults.rounds)

    command = commands.add_parser("peers", help="our services compared with others, and the required figures")
    command.set_defaults(run=_peers)
    standard = side_by_side.ComparisonOptions()
    command.add_argument("--peers", nargs="*", choices=standard.peers, default=standard.peers)
    command.add_argument("--cold-starts", type=int, default=standard.n_cold_starts, help="how often; 0: not at all")
    _add_common(command, seconds=standard.seconds, rounds=standard.rounds)

    command = commands.add_parser("jobs", help="what jobs cost, and what they cost others")
    command.set_defaults(run=_jobs)
    usual = jobs.JobsOptions()
    command.add_argument("figures", nargs="*", choices=[*jobs.FIGURES, []], metavar="FIGURE", help=", ".join(jobs.FIGURES))
    command.add_argument("--jobs", type=int, default=usual.n_jobs, help=f"that are queued (default {usual.n_jobs})")
    _add_common(command, seconds=usual.seconds, rounds=usual.rounds)

    command = commands.add_parser("batch", help="batch scoring against the libraries alone, and its memory")
    command.set_defaults(run=_batch)
    command.add_argument("--rows", type=int, default=batch.BatchOptions().rows, help="of the comparison")
    command.add_argument("--rounds", type=int, default=batch.BatchOptions().rounds, help="of which medians are taken")
    command.add_argument("--peer-rows", type=int, default=0, help="of the comparison with MLServer and MLflow (default: none)")
    command.add_argument("--quick", action="store_true", help="a quick check that it works; the numbers mean little")
    command.add_argument("--name", help="of the results files")

    command = commands.add_parser("soak", help="a long mixed load: are memory and file descriptors flat, is every answer right")
    command.set_defaults(run=_soak)
    command.add_argument("--seconds", type=float, default=600.0, help="of load (default 600)")
    command.add_argument("--per-s", type=float, default=50.0, help="requests a second (default 50)")
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of our services")
    command.add_argument("--name", help="of the results files")
    return parser


def _add_common(command: argparse.ArgumentParser, *, seconds: float, rounds: int) -> None:
    command.add_argument("--seconds", type=float, default=seconds, help=f"of each load (default {seconds:g})")
    command.add_argument("--rounds", type=int, default=rounds, help=f"of which medians are taken (default {rounds})")
    command.add_argument("--quick", action="store_true", help="a quick check that it works; the numbers mean little")
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of our services")
    command.add_argument("--name", help="of the results files")


def _own(arguments: argparse.Namespace) -> int:
    options = own.OwnOptions(
        models=tuple(arguments.models),
        protocols=tuple(arguments.protocols),
        concurrency=(1, 16) if arguments.quick else tuple(arguments.concurrency),
        systems=tuple(arguments.systems),
        seconds=1.0 if arguments.quick else arguments.seconds,
        rounds=1 if arguments.quick else arguments.rounds,
        rates=(0.5,) if arguments.quick else tuple(arguments.rates),
        n_cold_starts=min(1, arguments.cold_starts) if arguments.quick else arguments.cold_starts,
        settings=systems.parse_settings(arguments.set),
        imagenet=arguments.imagenet,
    )
    machine = this_machine()
    with tempfile.TemporaryDirectory() as scratch:
        found = own.run(options, Path(scratch))
    _write(arguments.name or f"own-{machine.commit}", machine, found.sections(), {"settings": options.settings, **found.data()})
    return found.n_failed


def _peers(arguments: argparse.Namespace) -> int:
    options = side_by_side.ComparisonOptions(
        peers=tuple(arguments.peers),
        seconds=1.0 if arguments.quick else arguments.seconds,
        rounds=1 if arguments.quick else arguments.rounds,
        n_cold_starts=min(1, arguments.cold_starts) if arguments.quick else arguments.cold_starts,
        settings=systems.parse_settings(arguments.set),
    )
    machine = this_machine()
    with tempfile.TemporaryDirectory() as scratch:
        found = side_by_side.run(options, Path(scratch))
    _write(arguments.name or f"peers-{machine.commit}", machine, found.sections(), {"settings": options.settings, **found.data()})
    return found.n_failed_of_ours


def _jobs(arguments: argparse.Namespace) -> int:
    options = jobs.JobsOptions(
        seconds=1.0 if arguments.quick else arguments.seconds,
        rounds=1 if arguments.quick else arguments.rounds,
        n_jobs=min(2_000, arguments.jobs) if arguments.quick else arguments.jobs,
        settings=systems.parse_settings(arguments.set),
    )
    machine = this_machine()
    with tempfile.TemporaryDirectory() as scratch:
        found = jobs.run(arguments.figures or jobs.FIGURES, options, Path(scratch))
    sections = {name: str(figure) for name, figure in found.items()}
    _write(arguments.name or f"jobs-{machine.commit}", machine, sections, {name: figure.facts for name, figure in found.items()})
    return sum(figure.n_failed for figure in found.values())


def _batch(arguments: argparse.Namespace) -> int:
    options = batch.BatchOptions(rows=arguments.rows, rounds=arguments.rounds, peer_rows=arguments.peer_rows)
    if arguments.quick:
        options = batch.BatchOptions(rows=20_000, memory_rows=(20_000, 40_000), rounds=1)
    machine = this_machine()
    with tempfile.TemporaryDirectory() as scratch:
        found = batch.run(options, Path(scratch))
    _write(arguments.name or f"batch-{machine.commit}", machine, found.sections(), msgspec.to_builtins(found))
    return 0


def _soak(arguments: argparse.Namespace) -> int:
    machine = this_machine()
    with tempfile.TemporaryDirectory() as scratch:
        found = soak.run(arguments.seconds, arguments.per_s, systems.parse_settings(arguments.set), Path(scratch))
    _write(arguments.name or f"soak-{machine.commit}", machine, found.sections(), msgspec.to_builtins(found))
    return found.n_failed


def _write(name: str, machine: Machine, sections: Mapping[str, str], data: Mapping[str, object]) -> None:
    path = report.write(name, machine, sections, data)
    print(f"\n{path.read_text()}\n{path}")


if __name__ == "__main__":
    main()
