"""A batch run, from a path to answers: check, plan, score what is not finished, join, count.

1. The release is chosen, every input file is checked, and the rows are divided into shards.
2. What the run depends on is written to the output as ``run.json``. If another run has begun there, its description is compared:
   an equal one is resumed, a different one refused with what differs.
3. An engine scores the shards that have no record yet.
4. One output file is joined from those of the shards, and the manifest is written last: a run with a manifest is complete.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import msgspec
import pyarrow as pa

from splitserve import __version__
from splitserve.checks.examination import NOTHING_MORE, Allowed
from splitserve.scoring import planning
from splitserve.scoring.engines import Engine
from splitserve.scoring.engines.choice import check_engine, engine_of
from splitserve.scoring.engines.processes import n_of_machine
from splitserve.scoring.errors import ScoringError, TooManyErrors, WrongUsage
from splitserve.scoring.planning import ColumnOptions, Listing, ShardSizes, Table
from splitserve.scoring.progress import Progress
from splitserve.scoring.release import ScoringRelease, choose
from splitserve.scoring.rows import CHUNK_BYTES, CHUNK_ROWS
from splitserve.scoring.shards import (
    RUN_FILE,
    ScoringJob,
    Selected,
    Shard,
    ShardResult,
    encode_job,
    shard_key,
)
from splitserve.scoring.sinks import FORMATS, check_types, format_of, join
from splitserve.scoring.sources.block import SHARD_BYTES, SHARD_ROWS, Part, Reading
from splitserve.scoring.sources.images import FILE
from splitserve.scoring.sources.reading import Reader
from splitserve.scoring.storage import SCRATCH_PREFIX, LocalStorage, Storage, absolute, resolved, storage_of
from splitserve.scoring.summary import Summary, summed

MANIFEST_FILE = "_splitserve/manifest.json"
LOCK_FILE = "_splitserve/lock"
DEFAULT_MAX_ERRORS = "10%"
MORE_ERRORS = 10_000
"""A shard is finished with its errors, unless it has so many more than the whole run may have."""

READER_VERSION = 2
"""Raised when this code reads values or divides rows in another way."""

_PERCENT = re.compile(r"([0-9]+(?:\.[0-9]+)?)%")


class ScoringOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the command's options say; docs/batch.md describes them."""

    repository: str = "./models"
    engine: str = "local"
    url: str = ""
    mapping: Mapping[str, str] = {}
    keep: tuple[str, ...] = ()
    to: str = ""
    encoding: str = "utf-8"
    delimiter: str = ""
    limit: int | None = None
    sample: float = 1.0
    max_errors: str = DEFAULT_MAX_ERRORS
    workers: int = 0
    resume: bool = True
    overwrite: bool = False
    escape_formulas: bool = False
    allowed: Allowed = NOTHING_MORE
    signature_key: str = ""
    shard_rows: int = SHARD_ROWS
    shard_bytes: int = SHARD_BYTES


class Output(msgspec.Struct, frozen=True):
    """Where answers go. ``root``: the folder of the shards' files."""

    path: str
    is_joined: bool
    format: str

    @property
    def root(self) -> str:
        return f"{self.path}.parts" if self.is_joined else self.path

    @property
    def errors(self) -> str:
        """The errors file, or the folder of errors."""
        if not self.is_joined:
            return f"{self.path}/_errors"
        suffix = next(suffix for suffix in FORMATS[self.format] if self.path.lower().endswith(suffix))
        return f"{self.path[: -len(suffix)]}.errors.jsonl"

    @property
    def manifest(self) -> str:
        return f"{self.path}.manifest.json" if self.is_joined else f"{self.path}/{MANIFEST_FILE}"


class Manifest(msgspec.Struct, frozen=True):
    """The last file that a run writes: what it depended on, its result, and its shards."""

    run: dict[str, Any]
    summary: Summary
    shards: tuple[ShardResult, ...]


class Plan(msgspec.Struct, frozen=True):
    """A run before its first row: the job, its shards, and what was left out."""

    job: ScoringJob
    shards: tuple[Shard, ...]
    output: Output
    facts: dict[str, Any]
    unused_columns: tuple[str, ...] = ()
    skipped_files: tuple[str, ...] = ()

    @property
    def n_rows(self) -> int | None:
        """Rows of the shards before a sample is taken; None if only reading tells."""
        counts = [shard.n_rows for shard in self.shards]
        return None if -1 in counts else sum(counts)


def plan(model: str, where: str, output: str, options: ScoringOptions) -> Plan:
    """Check everything that can be checked before the first row, and divide the rows.

    Raises:
        ScoringError: names what does not fit.
    """
    check_engine(options.engine)
    _check_options(options)
    release = _release(model, options)
    listing = planning.list_files(where)
    target = _output(output, options, listing)
    columns = ColumnOptions(
        options.mapping, _kept(options, listing), options.encoding, options.delimiter, target.format, target.is_joined
    )
    table = planning.check_columns(listing, release, columns)
    job = ScoringJob(
        release=release,
        files=tuple(table.files),
        input=listing.root,
        input_format=listing.format,
        root=target.root,
        output_format=target.format,
        kept=table.kept,
        kept_schema=table.kept_schema.serialize().to_pybytes(),
        selected=Selected(options.sample),
        encoding=options.encoding,
        delimiter=options.delimiter,
        is_joined=target.is_joined,
        escapes_formulas=options.escape_formulas,
        url=options.url,
        version=__version__,
    )
    check_types(job.schema, target.format)
    sizes = ShardSizes(options.shard_rows, options.shard_bytes)
    divided = planning.divide(table, listing.format, columns, is_row_wise=release.is_row_wise, sizes=sizes)
    if options.limit is not None:
        divided = planning.limited(divided, options.limit, lambda part: _count(job, part))
    facts = _facts(release, options, table, target)
    planned = Plan(
        job=job,
        shards=_shards(divided, job, facts),
        output=target,
        facts=facts,
        unused_columns=tuple(table.unused),
        skipped_files=tuple(file.removeprefix(listing.root).lstrip("/") for file in listing.skipped),
    )
    if planned.n_rows is None and "%" in options.max_errors:
        return planned
    most = int(_allowed_errors(options.max_errors, planned.n_rows or 0)) + MORE_ERRORS
    return msgspec.structs.replace(planned, job=msgspec.structs.replace(job, most_errors=most))


def _release(model: str, options: ScoringOptions) -> ScoringRelease:
    if options.url:
        from splitserve.scoring.remote import release_at  # here: it needs the client

        return release_at(options.url, model)
    repository = absolute(options.repository)  # a worker may have another current folder
    return choose(model, repository, allowed=options.allowed, signature_key=options.signature_key)


def _check_options(options: ScoringOptions) -> None:
    if not 0 < options.sample <= 1:
        raise WrongUsage(f"--sample: expected a share above 0 and at most 1, or a percentage; got {options.sample:g}")
    if options.workers < 0:
        raise WrongUsage(f"--workers: expected 0 (one a core) or more, got {options.workers}")
    if options.to and options.to not in FORMATS:
        raise WrongUsage(f"--to {options.to}: expected one of {', '.join(FORMATS)}")
    _allowed_errors(options.max_errors, 0)
    if options.delimiter and (len(options.delimiter) > 1 or not options.delimiter.isascii() or options.delimiter in '"\r\n'):
        raise WrongUsage(
            f"--delimiter {options.delimiter!r}: expected one ASCII character that is neither a quote nor a line break"
        )
    try:
        "".encode(options.encoding)
    except LookupError:
        raise WrongUsage(f"--encoding {options.encoding}: Python knows no such encoding") from None


def _kept(options: ScoringOptions, listing: Listing) -> tuple[str, ...]:
    """Without names, an answer of a picture cannot be told from the others."""
    return options.keep or ((FILE,) if listing.format == "images" else ())


def _output(where: str, options: ScoringOptions, listing: Listing) -> Output:
    path = absolute(where).rstrip("/")
    named = format_of(path)
    if named and options.to and named != options.to:
        raise WrongUsage(f"{where}: the name says {named}, --to says {options.to}")
    if not named and re.search(r"\.[A-Za-z0-9]+$", path.rpartition("/")[2]) and not storage_of(path).is_folder(path):
        suffixes = ", ".join(suffix for each in FORMATS.values() for suffix in each)
        raise WrongUsage(f"{where}: expected a name with one of {suffixes}, or without a suffix for a folder")
    own = {"images": "parquet"}.get(listing.format, listing.format)
    output = Output(path, bool(named), named or options.to or own)
    visible = (path, output.errors) if output.is_joined else (f"{path}/part-00000{FORMATS[output.format][0]}",)
    if path == listing.root or any(planning.would_list(listing, each) for each in visible):
        raise WrongUsage(f"{where}: the output is in the input's folder, where the next run would read it; name another folder")
    written = {resolved(each) for each in (output.path, output.manifest, output.errors)}
    for file in listing.files:
        found = resolved(file.path)
        if found in written or found.startswith(f"{resolved(output.root)}/"):
            raise WrongUsage(f"{where}: the output is the input, or has it in its files: {file.path}")
    return output


def _count(job: ScoringJob, part: Part) -> int:
    file = job.files[part.file]
    reading = Reading(job.release.inputs, file.bindings, (), file.partitions, job.encoding, job.delimiter)
    return sum(len(block.rows) + len(block.unreadable) for block in Reader().read(job, part, reading))


def _facts(release: ScoringRelease, options: ScoringOptions, table: Table, target: Output) -> dict[str, Any]:
    """Everything that rows or columns of the output depend on, as JSON has it."""
    facts = {
        **release.facts,
        "reader": f"splitserve {READER_VERSION}, pyarrow {pa.__version__}",
        "calls": f"{CHUNK_ROWS} rows, {CHUNK_BYTES} bytes",
        "shards": f"{options.shard_rows} rows, {options.shard_bytes} bytes",
        "--map": dict(options.mapping),
        "--keep": list(table.kept),
        "--to": target.format,
        "--limit": options.limit,
        "--sample": options.sample,
        "--encoding": options.encoding,
        "--delimiter": options.delimiter,
        "--escape-formulas": options.escape_formulas,
        "input": {file.path: str(file.identity) for file in table.files},
    }
    plain: dict[str, Any] = msgspec.to_builtins(facts)
    return plain


def _shards(divided: Sequence[Sequence[Part]], job: ScoringJob, facts: Mapping[str, Any]) -> tuple[Shard, ...]:
    common = {name: value for name, value in facts.items() if name != "input"}
    shards = []
    for number, parts in enumerate(divided):
        files = {job.files[part.file].path: str(job.files[part.file].identity) for part in parts}
        key = shard_key({**common, "number": number, "files": files, "parts": msgspec.to_builtins(parts)})
        below = "" if job.is_joined else job.files[parts[0].file].below
        shards.append(Shard(number, key, tuple(parts), below))
    return tuple(shards)


def run(planned: Plan, options: ScoringOptions, *, engine: Engine | None = None, shows_progress: bool = False) -> Summary:
    """Score what is not finished, and complete the output.

    Raises:
        TooManyErrors: more rows failed than are allowed, with shards left.
        ScoringError: a shard cannot be scored, or the output is another run's.
    """
    began = time.perf_counter()
    output, job = planned.output, planned.job
    storage = storage_of(output.path)
    try:
        if complete := _completed(planned, storage, options):
            return complete
        _begin(planned, storage, options)
        with _locked(storage, output.root):
            known = _finished(planned, storage)
            results = dict(known)
            todo = [shard for shard in planned.shards if shard.number not in known]
            n_rows = planned.n_rows if options.sample >= 1 else None
            with Progress(n_rows, shows=shows_progress) as progress:
                _go_on(known, progress)
                for result in _scored(engine or engine_of(options.engine, n_workers(options)), job, todo, progress):
                    results[result.number] = result
                    _check_errors(results.values(), planned, options, n_left=len(planned.shards) - len(results))
            ordered = [results[shard.number] for shard in planned.shards]
            summary = summed(
                job.release,
                ordered,
                seconds=time.perf_counter() - began,
                resumed_shards=len(known),
                output=output.path,
                errors_file=output.errors,
                unused_columns=planned.unused_columns,
                skipped_files=planned.skipped_files,
                fresh=[results[shard.number] for shard in todo],
            )
            summary = msgspec.structs.replace(summary, exit_status=_status(summary, options))
            _complete(planned, storage, ordered, summary)
        if output.is_joined:
            storage.remove(output.root)
    except OSError as error:
        raise ScoringError(f"{error.filename or output.path}: {error.strerror or error}") from error
    return summary


def n_workers(options: ScoringOptions) -> int:
    """Processes of this machine: one a core by default."""
    return n_of_machine(options.workers)


def _scored(engine: Engine, job: ScoringJob, todo: Sequence[Shard], progress: Progress) -> Iterator[ShardResult]:
    """The results of the shards, with what engines have not reported of their rows."""
    base_rows, base_errors = progress.done, progress.errors
    if not todo:
        return
    n_rows = n_errors = 0
    with contextlib.closing(engine.run(encode_job(job), todo, progress.add)) as found:
        for result in found:
            n_rows, n_errors = n_rows + result.rows, n_errors + result.errors
            missing = base_rows + n_rows - progress.done
            if missing > 0:
                progress.add(missing, max(base_errors + n_errors - progress.errors, 0))
            yield result


def _go_on(known: Mapping[int, ShardResult], progress: Progress) -> None:
    if known:
        progress.resumed(sum(each.rows for each in known.values()), sum(each.errors for each in known.values()))


def _completed(planned: Plan, storage: Storage, options: ScoringOptions) -> Summary | None:
    """The result of an equal run that is complete.

    Raises:
        ScoringError: another run's output is there.
    """
    output = planned.output
    if not storage.exists(output.manifest):
        return None
    if options.overwrite:
        return None
    with storage.open(output.manifest) as file:
        manifest: Manifest = _decoded(file, Manifest, output.manifest)
    if not storage.exists(output.path):
        return None
    _refuse_differences(output.path, manifest.run, planned.facts)
    summary: Summary = manifest.summary
    return msgspec.structs.replace(summary, seconds=0.0, stage_seconds={}, resumed_shards=summary.shards)


def _decoded(file: IO[bytes], kind: type[Any], path: str) -> Any:
    try:
        return msgspec.json.decode(file.read(), type=kind)
    except msgspec.DecodeError as error:
        raise ScoringError(f"{path}: is not what a run writes: {error}; --overwrite starts again") from error


def _refuse_differences(path: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises:
    ScoringError: says how two runs differ.
    """
    differences = []
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if name == "input" and isinstance(old, dict) and isinstance(new, dict):
            changed = [file for file in dict.fromkeys([*old, *new]) if old.get(file) != new.get(file)]
            shown = [f"{file} (was {old.get(file, 'absent')}, is {new.get(file, 'absent')})" for file in changed[:3]]
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            differences.append(f"input {', '.join(shown)}{more}")
        else:
            differences.append(f"{name} (was {_said(old)}, is {_said(new)})")
    if differences:
        raise ScoringError(
            f"{path}: has the output of another run, which differs in {'; '.join(differences)}; --overwrite replaces it"
        )


def _said(value: Any) -> str:
    return "none" if value is None or value == "" else str(value)[:80]


def _begin(planned: Plan, storage: Storage, options: ScoringOptions) -> None:
    """Make the output's folder this run's.

    Raises:
        ScoringError: something else is there.
    """
    output = planned.output
    description = f"{output.root}/{RUN_FILE}"
    has_begun = storage.exists(description)
    if options.overwrite:
        _remove(output, storage, has_begun)
        has_begun = False
    if has_begun:
        with storage.open(description) as file:
            before = _decoded(file, dict, description)
        _refuse_differences(output.path, before, planned.facts)
        if not options.resume:
            raise ScoringError(f"{output.path}: the run has begun there; --resume goes on, --overwrite starts again")
        return
    if output.is_joined and storage.exists(output.path):
        raise ScoringError(f"{output.path}: exists, and is not the output of this run; --overwrite replaces it")
    if not output.is_joined and storage.exists(output.path) and storage.files(output.path):
        raise ScoringError(f"{output.path}: expected an empty or no folder, and it has files that are no run's")
    with storage.writing(description) as file:
        file.write(msgspec.json.format(msgspec.json.encode(planned.facts)))


def _remove(output: Output, storage: Storage, has_begun: bool) -> None:
    """Remove what runs have written, and nothing else."""
    if output.is_joined:
        for path in (output.manifest, output.path, output.errors, output.root):
            storage.remove(path)
    elif has_begun:
        storage.remove(output.root)


@contextlib.contextmanager
def _locked(storage: Storage, root: str) -> Iterator[None]:
    """One run at a time writes to a folder of this machine; leftovers of one that was killed are removed.

    Raises:
        ScoringError: another run writes there.
    """
    if not isinstance(storage, LocalStorage):
        yield
        return
    import fcntl

    with (Path(root) / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ScoringError(f"{root}: another run is writing there") from None
        for path in storage.files(root):
            if Path(path).name.startswith(SCRATCH_PREFIX):
                storage.remove(path)
        yield
    with contextlib.suppress(FileNotFoundError):
        (Path(root) / LOCK_FILE).unlink()


def _finished(planned: Plan, storage: Storage) -> dict[int, ShardResult]:
    """The shards that have a record, by number."""
    job, found = planned.job, {}
    present = set(storage.files(planned.output.root))
    for shard in planned.shards:
        if {job.record_path(shard), job.data_path(shard)} <= present:
            with storage.open(job.record_path(shard)) as file:
                result: ShardResult = _decoded(file, ShardResult, job.record_path(shard))
            if result.key == shard.key and (not result.errors or job.errors_path(shard) in present):
                found[shard.number] = result
    return found


def _allowed_errors(text: str, n_rows: int) -> float:
    """How many errors are allowed among so many rows."""
    if match := _PERCENT.fullmatch(text):
        if float(match[1]) <= 100:
            return float(match[1]) / 100 * n_rows
    elif text.isdecimal():
        return int(text)
    raise WrongUsage(f"--max-errors {text}: expected a number of rows, or a percentage like 1%")


def _check_errors(results: Any, planned: Plan, options: ScoringOptions, *, n_left: int) -> None:
    """Raises:
    TooManyErrors: there are more errors than the whole run may have, and shards are left.
    """
    n_errors = sum(result.errors for result in results)
    if not n_left or not n_errors:
        return
    if planned.n_rows is None and "%" in options.max_errors:
        return  # a share of an unknown number: known at the end
    if n_errors > _allowed_errors(options.max_errors, planned.n_rows or 0):
        first = next(result.first_error for result in results if result.errors)
        raise TooManyErrors(
            f"{n_errors} rows failed, more than --max-errors {options.max_errors} allows; {n_left} shards are left. The first: "
            f"{first}. Errors so far are in {planned.output.root}/_errors; the same command with a higher --max-errors goes on"
        )


def _status(summary: Summary, options: ScoringOptions) -> int:
    """3 if too many rows failed, or all of them."""
    if summary.errors and (summary.scored == 0 or summary.errors > _allowed_errors(options.max_errors, summary.rows)):
        return TooManyErrors.exit_status
    return 0


def _complete(planned: Plan, storage: Storage, results: Sequence[ShardResult], summary: Summary) -> None:
    """Join the files of the shards if the output is one file, and write the manifest."""
    job, output = planned.job, planned.output
    if output.is_joined:
        with storage.writing(output.path, output.root) as file:
            join(storage, [job.data_path(shard) for shard in planned.shards], file, job.schema, output.format)
        with_errors = [shard for shard, result in zip(planned.shards, results, strict=True) if result.errors]
        if with_errors:
            with storage.writing(output.errors, output.root) as file:
                join(storage, [job.errors_path(shard) for shard in with_errors], file, job.schema, "jsonl")
        else:
            storage.remove(output.errors)
    elif not planned.shards:
        with storage.writing(f"{output.path}/part-00000{FORMATS[output.format][0]}") as file:
            join(storage, [], file, job.schema, output.format)
    manifest = Manifest(planned.facts, summary, tuple(results))
    with storage.writing(output.manifest, output.root) as file:
        file.write(msgspec.json.format(msgspec.json.encode(manifest)))
