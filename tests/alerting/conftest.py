"""Services, Prometheus and Alertmanager, running."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import trustme

from splitserve import publish_predictor, publish_preprocessor, release
from tests.alerting.monitoring import Program, Webhook, start_alertmanager, start_prometheus, write_rules
from tests.certificates import Files, write
from tests.system.models import affine_model
from tests.system.processes import Process, System, free_ports, wait_until

N_FEATURES = 3
THRESHOLDS = {"restarts": 0.5, "streams_per_replica": 0.5, "oldest_job_seconds": 0.5, "queue_wait_seconds": 0.05}
"""A process cannot be started four times in the few seconds that 15 minutes are here: once has to do."""


ROW = {"inputs": [{"name": "features", "datatype": "FP32", "shape": [1, N_FEATURES], "data": [1.0] * N_FEATURES}]}
"""A request for the model "slow"."""


class Watched(NamedTuple):
    """A system that is watched: its model repository, the certificate of the proxy's admin listener, and what watches."""

    repository: Path
    system: System
    certificate: Files
    authority: trustme.CA
    rules: Path
    prometheus: Program
    webhook: Webhook


@pytest.fixture(scope="session")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Three services and jobs, with a model whose transform takes 20 ms a row."""
    folder = tmp_path_factory.mktemp("watched")
    repository = folder / "models"
    repository.mkdir()
    publish_slow(repository)
    authority = trustme.CA()
    certificate = write(folder / "tls", authority)
    proxy, preprocess, predict, jobs, jobs_grpc = free_ports(5)
    with ExitStack() as stack:
        system = System(
            repository,
            PYTHONPATH=str(Path(__file__).parents[2]),
            PREPROCESS_TRUSTED_MODULES="tests.system.sleeping",
            PROXY_MAX_BATCH_SIZE="1", PROXY_MAX_IN_FLIGHT="1", PROXY_MAX_QUEUE_WAIT_MS="200",
            PROXY_ADMIN_PORT=str(proxy), PREPROCESS_ADMIN_PORT=str(preprocess), PREDICT_ADMIN_PORT=str(predict),
            PROXY_ADMIN_TLS_CERT_FILE=certificate.cert, PROXY_ADMIN_TLS_KEY_FILE=certificate.key,
            PROXY_JOBS_TARGET=f"127.0.0.1:{jobs_grpc}",
            PREDICT_REFRESH_INTERVAL_S="0.1", PREDICT_UNLOAD_DELAY_S="1", PREPROCESS_UNLOAD_DELAY_S="1",
        )  # fmt: skip
        stack.callback(system.stop)
        system.processes["jobs"] = Process(
            "jobs_service",
            {
                "JOBS_DIR": str(folder / "jobs"), "JOBS_GRPC_PORT": str(jobs_grpc), "JOBS_PROXY_TARGET": system.grpc,
                "JOBS_ADMIN_PORT": str(jobs),
            },
        )  # fmt: skip
        system.wait_until_settled()
        webhook = stack.enter_context(Webhook())
        write_rules(folder, THRESHOLDS)
        alertmanager = start_alertmanager(folder, webhook.url)
        stack.callback(alertmanager.stop)
        targets = [
            {"targets": [f"127.0.0.1:{port}" for port in (preprocess, predict, jobs)]},
            {"targets": [f"127.0.0.1:{proxy}"], "labels": {"__scheme__": "https"}},
        ]
        prometheus = start_prometheus(folder, targets, alertmanager=alertmanager.url.removeprefix("http://"))
        stack.callback(prometheus.stop)
        wait_until(lambda: len(prometheus.query("splitserve_ready == 1")) == 4, "all services are scraped and ready")
        yield Watched(repository, system, certificate, authority, folder, prometheus, webhook)


def publish_slow(repository: Path, *, version: int = 1) -> None:
    """A model "slow" of three features: this version of both halves, which must be the next one, and their release."""
    from tests.system.sleeping import Sleeping

    rows, modules = np.ones((1, N_FEATURES), np.float32), ["tests.system.sleeping"]
    publish_preprocessor(Sleeping(0.02), rows, name="slow", repository=repository, trusted_modules=modules)
    publish_predictor(affine_model(N_FEATURES, 2, version), rows, name="slow", repository=repository)
    release("slow", f"{version}.{version}", repository=repository, accept_unknown_features=True, trusted_modules=modules)
