"""What an operator looks at first, of one or several services: made from what their scrapes say."""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec

from splitserve.telemetry import families
from splitserve.telemetry.families import OK
from splitserve.telemetry.reading import Interval
from splitserve.telemetry.registry import Family

_STAGES = ("proxy", "preprocess", "predict", "jobs")
_PHASES = ("queue", "compute", "hop", "encode")


class Quantiles(msgspec.Struct, frozen=True):
    """Of durations, in milliseconds; None: there were none."""

    p50_ms: float | None
    p99_ms: float | None


class ListenerView(msgspec.Struct, frozen=True):
    """One admin listener, and the process or processes that it speaks for. ``problem``: why it does not answer; "" if it does."""

    url: str
    problem: str = ""
    not_ready_reason: str = ""
    version: str = ""
    workers: int | None = None
    workers_up: int | None = None
    cpu_cores: float | None = None
    memory_bytes: int | None = None
    loop_lag_p99_ms: float | None = None


class StageView(msgspec.Struct, frozen=True):
    """One stage at one listener. ``errors_per_s`` is by code; calls are those to the next stage, or runs of the model."""

    url: str
    stage: str
    is_ready: bool
    requests_per_s: float | None
    errors_per_s: dict[str, float]
    latency: Quantiles
    phases: dict[str, Quantiles]
    rows_per_call: float | None
    requests_per_call: float | None
    queued: int
    in_flight: int
    in_flight_bytes: int | None
    refusals_per_s: dict[str, float]
    retries_per_s: dict[str, float]
    replicas: dict[str, int]


class ReleaseView(msgspec.Struct, frozen=True):
    """One release at one stage; at predict a version. ``ready_since`` is Unix time, None if it is not ready."""

    url: str
    stage: str
    model: str
    release: str
    ready_since: float | None
    requests_per_s: float | None
    failures_per_s: float | None
    rows_per_s: float | None
    mean_ms: float | None
    queued: int
    in_flight: int
    golden_error_ratio: float | None


class JobsView(msgspec.Struct, frozen=True):
    """A queue of jobs."""

    url: str
    is_ready: bool
    queued: int
    running: int
    oldest_queued_s: float
    attempts_per_s: float | None
    webhooks_pending: int


class View(msgspec.Struct, frozen=True):
    """All of it, at one moment (Unix time). Rates and durations are of the last ``interval_s`` seconds."""

    time: float
    interval_s: float
    listeners: tuple[ListenerView, ...]
    stages: tuple[StageView, ...]
    releases: tuple[ReleaseView, ...]
    jobs: tuple[JobsView, ...]


def view_of(time: float, found: Iterable[tuple[ListenerView, Interval | None]]) -> View:
    """What listeners say.

    Args:
        time: of now, in Unix time.
        found: each listener, as far as it is known, with its scrapes; None: it does not answer.
    """
    listeners, stages, releases, jobs, interval_s = [], [], [], [], 0.0
    for listener, interval in found:
        if interval is None:
            listeners.append(listener)
            continue
        interval_s = max(interval_s, interval.seconds)
        listeners.append(_with_process(listener, interval))
        for stage in interval.now.values_of(families.READY, "stage"):
            if stage == "jobs":
                jobs.append(_jobs(listener.url, interval))
            else:
                stages.append(_stage(listener.url, stage, interval))
                releases += _releases(listener.url, stage, interval)
    stages.sort(key=lambda each: _STAGES.index(each.stage) if each.stage in _STAGES else len(_STAGES))
    return View(time, round(interval_s, 3), tuple(listeners), tuple(stages), tuple(releases), tuple(jobs))


def _with_process(listener: ListenerView, interval: Interval) -> ListenerView:
    now = interval.now
    workers = [value for _, _, value in now.select(families.WORKER_UP.name, {})]
    return msgspec.structs.replace(
        listener,
        version=next(iter(now.values_of(families.BUILD, "version")), ""),
        workers=len(workers) or None,
        workers_up=_whole(sum(workers)) if workers else None,
        cpu_cores=_rounded(interval.per_s(families.CPU)),
        memory_bytes=_whole(now.value(families.RSS)),
        loop_lag_p99_ms=_ms(interval.quantile(families.LOOP_LAG, 0.99)),
    )


def _stage(url: str, stage: str, interval: Interval) -> StageView:
    now = interval.now
    has_face = now.values_of(families.REQUEST_SECONDS, "protocol", stage=stage)
    if has_face:
        requests_per_s = interval.per_s(families.REQUESTS, stage=stage)
        by_outcome = _rates(interval, families.REQUESTS, "code", stage)
    else:  # part of a process that has the faces of another stage
        requests_per_s = interval.per_s(families.INFERENCES, stage=stage)
        by_outcome = _rates(interval, families.INFERENCES, "outcome", stage)
    return StageView(
        url,
        stage,
        is_ready=_is_ready(interval, stage),
        requests_per_s=_rounded(requests_per_s),
        errors_per_s={outcome: rate for outcome, rate in by_outcome.items() if outcome not in (OK, "succeeded")},
        latency=_quantiles(interval, families.REQUEST_SECONDS, stage=stage),
        phases={
            phase: _quantiles(interval, families.PHASE_SECONDS, stage=stage, phase=phase)
            for phase in _PHASES
            if now.values_of(families.PHASE_SECONDS, "phase", stage=stage, phase=phase)
        },
        rows_per_call=_rounded(interval.mean(families.CALL_ROWS, stage=stage)),
        requests_per_call=_rounded(interval.mean(families.CALL_REQUESTS, stage=stage)),
        queued=_whole(now.value(families.QUEUED, stage=stage)) or 0,
        in_flight=_whole(now.value(families.IN_FLIGHT, stage=stage)) or 0,
        in_flight_bytes=_whole(now.value(families.BYTES_IN_FLIGHT, stage=stage)),
        refusals_per_s=_rates(interval, families.REFUSED, "reason", stage),
        retries_per_s=_rates(interval, families.RETRIES, "kind", stage),
        replicas={
            state: _whole(now.value(families.REPLICAS, stage=stage, state=state)) or 0
            for state in now.values_of(families.REPLICAS, "state", stage=stage)
        },
    )


def _rates(interval: Interval, family: Family, label: str, stage: str) -> dict[str, float]:
    """Of a stage, by the values of a label, as far as they are not 0."""
    rates = interval.per_s_by(family, (label,), stage=stage)
    return {value: round(rate, 3) for (value,), rate in rates.items() if rate}


def _is_ready(interval: Interval, stage: str) -> bool:
    """With several workers, one that is ready is enough: it gets the requests."""
    return bool(interval.now.value(families.READY, stage=stage))


def _releases(url: str, stage: str, interval: Interval) -> list[ReleaseView]:
    now, place = interval.now, ("model", "release")
    outcomes = interval.per_s_by(families.INFERENCES, (*place, "outcome"), stage=stage)
    seconds, rows = (interval.per_s_by(family, place, stage=stage) for family in (families.INFERENCE_SECONDS, families.ROWS))
    queued, in_flight = (now.values_by(family, place, stage=stage) for family in (families.QUEUED, families.IN_FLIGHT))
    since, golden = (now.values_by(family, place, max, stage=stage) for family in (families.LOADED_AT, families.GOLDEN_ERROR))
    found = []
    for model, release in now.values_by(families.INFERENCES, place, stage=stage):
        key = (model, release)
        succeeded, failed = (outcomes.get((*key, outcome)) for outcome in ("succeeded", "failed"))
        found.append(
            ReleaseView(
                url,
                stage,
                model,
                release,
                ready_since=since.get(key),
                requests_per_s=None if succeeded is None else round(succeeded + (failed or 0.0), 3),
                failures_per_s=_rounded(failed),
                rows_per_s=_rounded(rows.get(key)),
                mean_ms=_ms(seconds[key] / succeeded) if succeeded else None,
                queued=_whole(queued.get(key)) or 0,
                in_flight=_whole(in_flight.get(key)) or 0,
                golden_error_ratio=golden.get(key),
            )
        )
    return found


def _jobs(url: str, interval: Interval) -> JobsView:
    now = interval.now
    return JobsView(
        url,
        is_ready=_is_ready(interval, "jobs"),
        queued=_whole(now.value(families.JOBS, max, status="queued")) or 0,  # each worker that counts has counted the same store
        running=_whole(now.value(families.JOBS, max, status="running")) or 0,
        oldest_queued_s=now.value(families.JOBS_OLDEST, max) or 0.0,
        attempts_per_s=_rounded(interval.per_s(families.JOB_ATTEMPTS)),
        webhooks_pending=_whole(now.value(families.WEBHOOKS, max)) or 0,
    )


def _quantiles(interval: Interval, family: Family, **labels: str) -> Quantiles:
    return Quantiles(_ms(interval.quantile(family, 0.5, **labels)), _ms(interval.quantile(family, 0.99, **labels)))


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _whole(value: float | None) -> int | None:
    return None if value is None or not math.isfinite(value) else int(value)
