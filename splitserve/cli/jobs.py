"""``splitserve jobs …``: submit, list, show, fetch, cancel; back up and restore the folder of a jobs service."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitserve.cli.connection import client
from splitserve.cli.infer import arrays_of, print_answer, reader
from splitserve.cli.tables import print_table
from splitserve.errors import DeadlineExceeded, NotFound, SplitserveError

if TYPE_CHECKING:
    from splitserve.client import Client, Job

TIMEOUT_S = 30.0


def _run(url: str, act: Callable[[Client], int]) -> int:
    """What ``act`` returns; 1 and the reason if it fails."""
    try:
        with client(url, timeout_s=TIMEOUT_S) as connection:
            return act(connection)
    except (SplitserveError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


def submit(
    model: str,
    file: Path | None,
    *,
    rows: str | None,
    url: str,
    version: str,
    options: dict[str, Any],
    is_awaited: bool,
    wait_s: float | None,
) -> int:
    """Print the job, or, if it is awaited, its answer."""
    if (file is None) == (rows is None):
        print("expected a file or --rows, got both or neither", file=sys.stderr)
        return 2
    read = reader(file, rows)

    def act(connection: Client) -> int:
        metadata = connection.metadata(model, version)
        job = connection.submit(model, arrays_of(read(metadata), metadata), version=version, **options)
        if not is_awaited:
            print(job.id)
            return 0
        print(f"job {job.id}", file=sys.stderr, flush=True)
        job.wait(wait_s)
        return _print_result(connection, job)

    return _run(url, act)


def _print_result(connection: Client, job: Job) -> int:
    answer = job.result()
    print_answer(answer, connection.metadata(answer.model, answer.version))
    return 0


def list_jobs(url: str, *, model: str, status: str, limit: int) -> int:
    """Print a table."""

    def act(connection: Client) -> int:
        found = connection.jobs(model=model, status=status, limit=limit)
        header = ("id", "status", "model", "version", "created", "attempt", "error")
        print_table(
            header,
            [
                (
                    *(job.id, job.status, job.model, job.version, _time(job.info.created), str(job.info.attempt)),
                    job.info.error.message if job.info.error else "",
                )
                for job in found
            ],
        )
        return 0

    return _run(url, act)


def show(job_id: str, url: str, *, wait_s: float) -> int:
    """Print the job as JSON, after waiting for its end."""
    import msgspec

    from splitserve.jobs.events import job_json

    def act(connection: Client) -> int:
        job = connection.job(job_id)
        if wait_s:
            try:
                job.wait(wait_s)
            except DeadlineExceeded:
                job.refresh()
        print(json.dumps(msgspec.to_builtins(job_json(job.info)), indent=2))
        return 0

    return _run(url, act)


def result(job_id: str, url: str, *, wait_s: float | None) -> int:
    """Print the answer as a table, once it is there."""
    return _run(url, lambda connection: _print_result(connection, connection.job(job_id).wait(wait_s)))


def cancel(job_ids: list[str], url: str) -> int:
    """Cancel jobs and print in which state each is; those that have ended stay as they are. 1 if there are not all of them."""

    def act(connection: Client) -> int:
        n_unknown = 0
        for job_id in job_ids:
            try:
                job = connection.job(job_id).cancel()
            except NotFound as error:
                print(error, file=sys.stderr)
                n_unknown += 1
            else:
                print(f"{job.id} {job.status}")
        return min(n_unknown, 1)

    return _run(url, act)


def backup(folder: Path, to: Path) -> int:
    """Copy a folder of jobs to an empty one, also while its service runs."""
    from splitserve.jobs.folder import DATABASE, PAYLOADS

    if to.exists() and any(to.iterdir()):
        print(f"{to}: expected an empty folder", file=sys.stderr)
        return 1
    database = folder / DATABASE
    if not database.exists():
        print(f"{folder}: there are no jobs", file=sys.stderr)
        return 1
    to.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Before the database and after it: jobs may end meanwhile, and their requests are removed; others are submitted.
    n_files = _copy_new(folder / PAYLOADS, to / PAYLOADS)
    (to / DATABASE).touch(mode=0o600)
    copied = sqlite3.connect(to / DATABASE)
    source = sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)
    try:
        source.backup(copied, pages=1000)
        copied.execute("PRAGMA journal_mode = DELETE")
        n_files += _copy_new(folder / PAYLOADS, to / PAYLOADS)
        rows = copied.execute(
            "SELECT request_ref FROM jobs WHERE request_ref <> '' UNION SELECT answer_ref FROM jobs WHERE answer_ref <> ''"
        )
        n_missing = sum(not (to / PAYLOADS / ref).exists() for (ref,) in rows)
    finally:
        source.close()
        copied.close()
    print(f"{to}: the database and {n_files} payloads")
    if n_missing:
        print(
            f"{n_missing} payloads that jobs name are not in {folder / PAYLOADS}: back up JOBS_PAYLOADS too, if it is elsewhere",
            file=sys.stderr,
        )
    return 0


def _copy_new(source: Path, to: Path) -> int:
    """Copy files that are not there yet, and are not removed meanwhile. Payloads are never changed. Returns their number."""
    if not source.is_dir():
        return 0
    to.mkdir(mode=0o700, exist_ok=True)
    n_copied = 0
    for path in source.iterdir():
        if path.suffix == ".tmp" or (to / path.name).exists():
            continue
        try:
            shutil.copy2(path, to / path.name)
            n_copied += 1
        except FileNotFoundError:
            continue
    return n_copied


def restore(folder: Path, source: Path) -> int:
    """Put a backup in the place of a folder of jobs, whose service must not run."""
    from splitserve.jobs.folder import DATABASE, LOCK, PAYLOADS, FolderInUse, locked

    if not (source / DATABASE).exists():
        print(f"{source}: expected a backup, which has {DATABASE}", file=sys.stderr)
        return 1
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        lock = locked(folder / LOCK, 0.0)
    except FolderInUse as error:
        print(f"{error}: stop it first", file=sys.stderr)
        return 1
    try:
        restored = folder / f"{DATABASE}.restored"  # what is there is not touched before all is copied
        shutil.copy2(source / DATABASE, restored)
        if (source / PAYLOADS).is_dir():
            shutil.copytree(source / PAYLOADS, folder / PAYLOADS, dirs_exist_ok=True)
        for suffix in ("-wal", "-shm"):  # a WAL that is left would be replayed over the restored database
            (folder / f"{DATABASE}{suffix}").unlink(missing_ok=True)
        restored.rename(folder / DATABASE)
    finally:
        os.close(lock)
    print(f"{folder}: restored; jobs that have ended since the backup are run again")
    return 0


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
