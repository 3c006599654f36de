"""Settings of the jobs service: environment variables that begin with ``JOBS_``."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
from pydantic import Field, field_validator
from pydantic_settings import SettingsConfigDict

from splitserve.jobs.folder import PAYLOADS
from splitserve.jobs.protobuf import max_wrapped_bytes
from splitserve.jobs.records import StoreRules
from splitserve.jobs.service import JobRules
from splitserve.jobs.webhooks import WebhookPolicy, read_secrets
from splitserve.jobs.worker import WorkerRules
from splitserve.server.admin_settings import AdminPort
from splitserve.server.face_settings import FaceSettings
from splitserve.server.grpc_config import GrpcConfig
from splitserve.server.settings import Target
from splitserve.server.tls_settings import NextStageTlsSettings

MIB = 1024 * 1024


class JobsSettings(NextStageTlsSettings, FaceSettings):
    """Settings of the jobs service."""

    model_config = SettingsConfigDict(env_prefix="JOBS_")
    stage = "jobs"

    admin_port: AdminPort = 8032
    """Port of the admin listener; 0: any free one; off: none."""

    grpc_port: int = Field(8031, ge=0, le=65535)
    """Port of the gRPC face. The proxy says there who calls, so that beyond loopback it requires mutual TLS. In the fused service
    with several workers: where the one that owns DIR serves the others, on loopback."""

    proxy_target: Target = "127.0.0.1:8001"
    """gRPC target of the proxy, which answers the jobs."""

    proxy_token_file: str = ""
    """File with the bearer token that the service presents to the proxy, if that has an authorization file. It needs the right to
    call all models that jobs are submitted for."""

    dir: str = "./jobs"
    """Folder of the jobs, of their database (SQLite) and of large payloads. On a local disk, for one process."""

    database_url: str = ""
    """PostgreSQL in place of SQLite, for several replicas of this service: `postgresql://user@host/database`. Its password
    belongs into the file that `PGPASSFILE` names."""

    database_direct_url: str = ""
    """The same database past a pooler in transaction mode, if DATABASE_URL is that of one: for LISTEN."""

    max_database_connections: int = Field(10, ge=2)
    """Maximum number of connections to PostgreSQL."""

    payloads: str = ""
    """Folder, or URL of a bucket, of requests and answers that are larger than INLINE_BYTES. By default a folder in JOBS_DIR;
    several replicas have to share it. It is for one database only: what that does not name is removed after an hour."""

    inline_bytes: int = Field(32 * 1024, ge=0)
    """Requests and answers up to this size are kept in the database, larger ones in files."""

    reserve_bytes: int = Field(64 * MIB, ge=0)
    """With less free disk space than this, jobs are refused with status 507; everything else still works."""

    ttl_s: float = Field(86_400.0, gt=0)
    """Seconds that a job and its result are kept once it has ended."""

    key_ttl_s: float = Field(86_400.0, gt=0)
    """Seconds that an idempotency key is remembered."""

    max_attempts: int = Field(8, ge=1)
    """Maximum number of attempts at a job whose failures are the system's (unavailable, deadline, not loaded), not its content's.
    Attempts that end because of a restart, a 429 or an unreachable proxy do not count."""

    lease_s: float = Field(10.0, gt=0)
    """Seconds without a heartbeat after which a worker's jobs are given to another one."""

    concurrency: int = Field(256, ge=1, le=10_000)
    """Maximum number of jobs in flight at the proxy. It adapts below that."""

    merged_rows: int = Field(32, ge=1)
    """Maximum number of rows of small jobs that are sent to the proxy as one request. 1: each job is a request."""

    nice: int = Field(10, ge=0, le=19)
    """Niceness of the process: where several want the CPU this one yields it, so that other requests do not wait for jobs."""

    default_timeout_s: float = Field(300.0, gt=0)
    """Seconds that an attempt may take, for jobs that do not say."""

    max_timeout_s: float = Field(300.0, gt=0)
    """Largest timeout that a job may ask for. The proxy's own limit, PROXY_MAX_TIMEOUT_S, applies too."""

    max_wait_s: float = Field(30.0, ge=0)
    """Longest time, in seconds, that a call waits for the end of a job. Less than the idle timeout of load balancers in front (60
    for nginx)."""

    max_streams: int = Field(8192, gt=0)
    """Maximum number of concurrent gRPC calls on one connection. Each caller that waits for the end of a job takes one on its
    proxy's, up to 4096."""

    max_jobs_per_caller: int = Field(1_000_000, ge=1)
    """Maximum number of queued and running jobs of one caller; more are refused with status 429."""

    webhook_hosts: str = ""
    """Hosts that webhooks may be sent to, separated by commas: names, or patterns like `*.example.org`. None: webhooks are
    refused. Their addresses have to be public ones."""

    webhook_secrets_file: str = ""
    """JSON file with the secrets that webhooks are signed with: `{"CALLER": ["whsec_BASE64"]}`; `*` is for callers without one of
    their own. With two secrets each webhook has both signatures. Reread when it changes."""

    lock_wait_s: float = Field(10.0, ge=0)
    """Seconds to wait for another process to release JOBS_DIR, e.g. one that is stopping."""

    @property
    def grpc_config(self) -> GrpcConfig:
        """Configuration of the gRPC face, whose messages are larger than the requests and answers in them."""
        config = super().grpc_config
        return msgspec.structs.replace(config, max_message_bytes=max_wrapped_bytes(config.max_message_bytes))

    @property
    def store_rules(self) -> StoreRules:
        """Rules of the store."""
        return StoreRules(max_attempts=self.max_attempts, ttl_s=self.ttl_s, key_ttl_s=self.key_ttl_s)

    @property
    def worker_rules(self) -> WorkerRules:
        """Limits of the worker."""
        return WorkerRules(window=self.concurrency, merged_rows=self.merged_rows, lease_s=self.lease_s)

    @property
    def job_rules(self) -> JobRules:
        """Limits on jobs."""
        return JobRules(
            timeout_s=min(self.default_timeout_s, self.max_timeout_s),
            max_timeout_s=self.max_timeout_s,
            max_wait_s=self.max_wait_s,
            max_jobs_per_caller=self.max_jobs_per_caller,
            max_request_bytes=self.max_message_bytes,
        )

    @property
    def payloads_place(self) -> str:
        """Folder or URL of large payloads."""
        return self.payloads or str(Path(self.dir) / PAYLOADS)

    @property
    def proxy_token(self) -> str:
        """The token for the proxy; "" without one."""
        return Path(self.proxy_token_file).read_text().strip() if self.proxy_token_file else ""

    @property
    def webhook_policy(self) -> WebhookPolicy:
        """Which webhooks are allowed, and how they are signed."""
        hosts = [host.strip() for host in self.webhook_hosts.split(",") if host.strip()]
        return WebhookPolicy(hosts, self.webhook_secrets_file)

    @field_validator("database_url", "database_direct_url")
    @classmethod
    def _check_database_url(cls, url: str) -> str:
        if url:
            try:
                from psycopg import ProgrammingError
                from psycopg.conninfo import conninfo_to_dict
            except ImportError:
                raise ValueError("PostgreSQL needs the extra jobs-postgres") from None
            try:
                conninfo_to_dict(url)
            except ProgrammingError:  # whose message may have the password
                raise ValueError("expected postgresql://USER@HOST/DATABASE") from None
        return url

    @field_validator("payloads")
    @classmethod
    def _check_payloads(cls, place: str) -> str:
        protocol, separator, _ = place.partition("://")
        if separator:
            try:
                import fsspec

                fsspec.get_filesystem_class(protocol)
            except (ValueError, ImportError) as error:
                raise ValueError(str(error)) from None
        return place

    @field_validator("webhook_secrets_file")
    @classmethod
    def _check_secrets(cls, path: str) -> str:
        if path:
            try:
                read_secrets(path)
            except OSError as error:
                raise ValueError(str(error)) from None
        return path

    @field_validator("proxy_token_file")
    @classmethod
    def _check_token_file(cls, path: str) -> str:
        if path:
            try:
                Path(path).read_text()
            except OSError as error:
                raise ValueError(str(error)) from None
        return path


def check(config: JobsSettings) -> None:
    """End the process if any client that reaches the port could claim to be any caller, or if processes would share a folder."""
    if not config.is_local and not config.tls_client_ca_file:
        print(
            f"JOBS_HOST: {config.host} is not loopback: callers are named by the proxy, which has to prove who it is "
            "(JOBS_TLS_CERT_FILE, JOBS_TLS_KEY_FILE and JOBS_TLS_CLIENT_CA_FILE)",
            file=sys.stderr,
        )
        raise SystemExit(2)
    if config.workers > 1 and not config.database_url:
        print("JOBS_WORKERS: several processes cannot share a folder; set JOBS_DATABASE_URL", file=sys.stderr)
        raise SystemExit(2)
