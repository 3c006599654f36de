"""Every metric of the services. docs/metrics.md is written from these."""

from __future__ import annotations

import msgspec

from splitserve.telemetry.recorders import LATENCY_BOUNDS, SIZE_BOUNDS
from splitserve.telemetry.registry import Family

PROTOCOLS = ("rest", "grpc", "stream")
"""How a request came: REST, gRPC unary, or a message on a gRPC stream."""

OK = "OK"

FAILURES = (
    "INTERNAL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "CANCELLED", "FAILED_PRECONDITION",
    "UNIMPLEMENTED", "NOT_FOUND", "PERMISSION_DENIED", "UNAUTHENTICATED",
)  # fmt: skip
"""The other codes of requests: those of docs/errors.md, and that of a request whose caller has left. What operators look for
comes first."""

UNKNOWN = "unknown"
"""The model of requests that name one that does not exist."""

_RELEASE = ("stage", "model", "release")

REQUESTS = Family(
    "splitserve_requests_total",
    "counter",
    "Inference requests that were answered, failed or cancelled, by their status. Model `unknown`: it does not exist. Release: "
    'the pair K.M, at predict the version; "" if the request failed before it was bound to one. 0 from the load on, for all '
    "codes unless there are very many releases (docs/telemetry.md). Those of predict include golden samples that preprocess "
    "replays.",
    (*_RELEASE, "protocol", "code"),
)
REQUEST_SECONDS = Family(
    "splitserve_request_duration_seconds",
    "histogram",
    "Of requests that succeeded: from the arrival at the stage until the answer is encoded. The thresholds of `SLO_LATENCY_MS` "
    "are further bounds.",
    ("stage", "protocol"),
    LATENCY_BOUNDS,
)
PHASE_SECONDS = Family(
    "splitserve_phase_duration_seconds",
    "histogram",
    "Parts of that. `queue`: in a queue, or waiting for a thread. `compute`: the transform and the postprocess step, or the run "
    "of the model. `hop`: the call to the next stage. `encode`: making the bytes of the answer.",
    ("stage", "phase"),
    LATENCY_BOUNDS,
)
INFERENCES = Family(
    "splitserve_inferences_total",
    "counter",
    "Requests that were bound to a release, by outcome: `succeeded`, `failed`. 0 from the load on.",
    (*_RELEASE, "outcome"),
)
INFERENCE_SECONDS = Family(
    "splitserve_inference_seconds_total", "counter", "Sum of the durations of inferences that succeeded.", _RELEASE
)
QUEUE_SECONDS = Family("splitserve_inference_queue_seconds_total", "counter", "Sum of the times that they were queued.", _RELEASE)
ROWS = Family("splitserve_rows_total", "counter", "Rows of inferences that succeeded.", _RELEASE)
CALLS = Family(
    "splitserve_calls_total",
    "counter",
    "Calls to the next stage, or runs of the model: each is for one or several requests.",
    _RELEASE,
)
CALL_ROWS = Family("splitserve_call_rows", "histogram", "Rows of a call or run that succeeded.", ("stage",), SIZE_BOUNDS)
CALL_REQUESTS = Family(
    "splitserve_call_requests", "histogram", "Requests that were merged into such a call or run.", ("stage",), SIZE_BOUNDS
)
QUEUED = Family("splitserve_queued_requests", "gauge", "Requests that wait for a call.", _RELEASE)
IN_FLIGHT = Family("splitserve_requests_in_flight", "gauge", "Requests that are queued or in a call.", _RELEASE)
CALLS_IN_FLIGHT = Family("splitserve_calls_in_flight", "gauge", "Calls or runs that have not ended.", _RELEASE)
ADMISSION_LIMIT = Family(
    "splitserve_admission_limit", "gauge", "Requests in flight beyond which more are refused now; +Inf: no limit.", _RELEASE
)
REFUSED = Family(
    "splitserve_refusals_total",
    "counter",
    "Requests that admission control refused: `queue_full`, `queue_wait` (the estimated wait exceeds its limit), `deadline` (or "
    "the request's deadline), `background` (jobs, while others wait), `preempted` (in favour of a higher priority).",
    ("stage", "reason"),
)
RETRIES = Family(
    "splitserve_retries_total",
    "counter",
    "Further attempts of calls to the next stage: `retry` after a failure, `hedge` beside a slow one, `refused` by the "
    "retry budget.",
    ("stage", "to", "kind"),
)
REPLICAS = Family(
    "splitserve_replicas", "gauge", "Replicas of the next stage: `ready` ones accept calls.", ("stage", "to", "state")
)
STREAMS_OPENED = Family(
    "splitserve_streams_opened_total",
    "counter",
    "Streams to replicas that were opened: more than there are replicas are reconnections.",
    ("stage", "to"),
)
READY = Family("splitserve_ready", "gauge", "1 if the stage is ready; `/readyz` has the reason if it is not.", ("stage",))
RELEASES = Family(
    "splitserve_releases",
    "gauge",
    "Releases, at predict versions, by state as in the repository index.",
    ("stage", "model", "state"),
)
LOADED_AT = Family(
    "splitserve_release_ready_timestamp_seconds", "gauge", "When this process found it ready, in Unix time.", _RELEASE
)
GOLDEN_ERROR = Family(
    "splitserve_golden_error_ratio",
    "gauge",
    "Of the golden samples of a release, as last replayed through all stages: the largest difference from the recorded answers, "
    "relative to its tolerance. Above 1 the release is refused; +Inf: something differs that may not.",
    _RELEASE,
)
LOADED = Family(
    "splitserve_loads_total",
    "counter",
    "Bundles that were tried: `loaded`, `refused` by a check, `not_fetched` (tried again), `failed` unexpectedly.",
    ("stage", "outcome"),
)
LOAD_REFUSALS = Family(
    "splitserve_load_refusals_total",
    "counter",
    "Bundles that a check refused: `files` (manifest, digests or signature), `release` (it is not the bundle that its releases "
    "recorded), `load` (types, library versions, or what is in it), `golden` (its golden samples differ).",
    ("stage", "reason"),
)
CACHE_BYTES = Family(
    "splitserve_model_cache_bytes",
    "gauge",
    "Bytes in the folder `MODEL_CACHE`, as of at most a minute ago; 0 if the model repository is a folder.",
)
BYTES_IN_FLIGHT = Family("splitserve_in_flight_bytes", "gauge", "Bytes of requests in flight.", ("stage",))
BYTES_LIMIT = Family("splitserve_in_flight_limit_bytes", "gauge", "Beyond which more are refused.", ("stage",))
JOBS = Family("splitserve_jobs", "gauge", "Jobs in the store, as of its last count: `queued`, `running`.", ("status",))
JOBS_OLDEST = Family("splitserve_jobs_oldest_queued_seconds", "gauge", "Age of the oldest queued job; 0: none is queued.")
JOB_ATTEMPTS = Family("splitserve_job_attempts_total", "counter", "Attempts to run a job.")
JOB_REFUSED_WRITES = Family(
    "splitserve_job_refused_writes_total", "counter", "Ends of jobs that came after another claim or a cancel."
)
JOBS_IN_FLIGHT = Family("splitserve_jobs_in_flight", "gauge", "Jobs that this process runs.")
JOBS_WINDOW = Family("splitserve_jobs_window", "gauge", "Jobs that it may run at a time.")
JOB_CALLERS = Family("splitserve_job_waiting_callers", "gauge", "Callers that wait for the end of a job.")
WEBHOOKS = Family("splitserve_webhooks_pending", "gauge", "Webhooks that are not delivered yet.")
CERTIFICATE_EXPIRY = Family(
    "splitserve_certificate_expiry_timestamp_seconds",
    "gauge",
    "When the certificates in use expire, in Unix time. `server` (the ports), `admin` (the admin listener), `client` (presented "
    "to the next stage): the first of the chain. `server CA`, `admin CA`, `client CA`: the last of the authorities that the "
    "other side is verified by.",
    ("use",),
)
LOOP_LAG = Family(
    "splitserve_event_loop_lag_seconds",
    "histogram",
    "How much later than intended the event loop woke up, ten times a second.",
    (),
    LATENCY_BOUNDS,
)
BUILD = Family("splitserve_build_info", "gauge", "1; the versions of splitserve and of Python.", ("version", "python"))
CPU = Family("process_cpu_seconds_total", "counter", "CPU time of the process, user and system.")
RSS = Family("process_resident_memory_bytes", "gauge", "Resident memory of the process. Linux only.")
STARTED = Family("process_start_time_seconds", "gauge", "When the process began, in Unix time.")
OPEN_FILES = Family("process_open_fds", "gauge", "Open file descriptors. Linux only.")
GC = Family("python_gc_collections_total", "counter", "Runs of the garbage collector, by generation.", ("generation",))
WORKER_UP = Family(
    "splitserve_worker_up", "gauge", "With several workers: 1 if it answered this scrape within 0.5 s.", ("index",)
)
WORKER_BEAT_AGE = Family(
    "splitserve_worker_beat_age_seconds",
    "gauge",
    "With several workers: how long ago its event loop last woke up, which it does ten times a second. Another process reads it.",
    ("index",),
)
SPANS_EXPORTED = Family(
    "splitserve_spans_exported_total", "counter", "Spans that the collector has accepted. Only with traces (docs/telemetry.md)."
)
SPANS_DROPPED = Family(
    "splitserve_spans_dropped_total",
    "counter",
    "Spans that were lost: `queue_full` (`OTEL_BSP_MAX_QUEUE_SIZE`), `not_exported` (the collector did not accept them), "
    "`not_made`.",
    ("reason",),
)
TELEMETRY_FAILURES = Family(
    "splitserve_telemetry_failures_total", "counter", "Failures of telemetry itself, by part: its metrics are missing.", ("part",)
)

FAMILIES = (
    REQUESTS, REQUEST_SECONDS, PHASE_SECONDS, INFERENCES, INFERENCE_SECONDS, QUEUE_SECONDS, ROWS, CALLS, CALL_ROWS,
    CALL_REQUESTS, QUEUED, IN_FLIGHT, CALLS_IN_FLIGHT, ADMISSION_LIMIT, REFUSED, RETRIES, REPLICAS, STREAMS_OPENED, READY,
    RELEASES, LOADED_AT, GOLDEN_ERROR, LOADED, LOAD_REFUSALS, CACHE_BYTES, BYTES_IN_FLIGHT, BYTES_LIMIT, JOBS, JOBS_OLDEST,
    JOB_ATTEMPTS, JOB_REFUSED_WRITES, JOBS_IN_FLIGHT, JOBS_WINDOW, JOB_CALLERS, WEBHOOKS, CERTIFICATE_EXPIRY, LOOP_LAG, BUILD,
    CPU, RSS, STARTED, OPEN_FILES, GC, WORKER_UP, WORKER_BEAT_AGE, SPANS_EXPORTED, SPANS_DROPPED, TELEMETRY_FAILURES,
)  # fmt: skip


def families_with(latency_bounds: tuple[float, ...]) -> tuple[Family, ...]:
    """`FAMILIES`, with these bounds of the durations of requests."""
    return tuple(
        msgspec.structs.replace(family, bounds=latency_bounds) if family is REQUEST_SECONDS else family for family in FAMILIES
    )
