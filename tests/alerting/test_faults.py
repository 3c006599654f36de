"""Faults of a running system: the alert of each arrives at a webhook, once, and once more when the fault has gone."""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from splitserve import withdraw
from tests.alerting.conftest import ROW, THRESHOLDS, Watched, publish_slow
from tests.alerting.monitoring import write_rules
from tests.certificates import replace, write

pytestmark = [pytest.mark.alerting, pytest.mark.timeout(300)]


def assert_told_once(watched: Watched, name: str, **labels: str) -> None:
    """It fires, then it is resolved; wait for that."""
    resolved = watched.webhook.wait_for("resolved", name, **labels)
    notices = watched.webhook.notices(name, **labels)

    assert [notice.status for notice in notices] == ["firing", "resolved"], notices
    for text in resolved.annotations.values():
        assert "<" not in text, text  # what Prometheus writes in place of a template that fails, or of a label that is missing


def test_a_stage_that_is_killed(watched: Watched) -> None:
    """It is missing and cannot be scraped, and the others are not ready; once it is back, it has started and is connected."""
    address = watched.system.predict
    watched.system.processes["predict"].signal(signal.SIGKILL)
    watched.system.processes["predict"].wait()
    told = [("SplitserveStageMissing", {"stage": "predict"}), ("SplitserveStageNotReady", {"stage": "proxy"})]
    told += [("SplitserveScrapeMissing", {}), ("SplitserveStageNotReady", {"stage": "preprocess"})]
    for name, labels in told:
        watched.webhook.wait_for("firing", name, **labels)

    watched.system.start_predict(int(address.rpartition(":")[2]))

    told += [("SplitserveRestarting", {}), ("SplitserveReplicaFlapping", {"stage": "preprocess"})]
    for name, labels in told:
        assert_told_once(watched, name, **labels)


def test_a_release_that_is_refused(watched: Watched, tmp_path: Path) -> None:
    """Predict refuses the version of a release whose file is not that of its manifest; then it is withdrawn."""
    other = tmp_path / "models"
    shutil.copytree(watched.repository, other)
    publish_slow(other, version=2)
    model = other / "slow/predict/2/model.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"?")
    for path in ("slow/preprocess/2", "slow/predict/2", "slow/releases/0002-2.2"):
        shutil.copytree(other / path, watched.repository / path)
    watched.webhook.wait_for("firing", "SplitserveReleaseRefused", stage="predict", model="slow")

    withdraw("slow", 2, repository=watched.repository)

    assert_told_once(watched, "SplitserveReleaseRefused", stage="predict", model="slow")


def test_more_requests_than_can_be_answered(watched: Watched) -> None:
    """Requests wait, and some are refused; jobs wait; the error budget burns. After the load all ends."""
    told: list[tuple[str, dict[str, str]]] = [
        ("SplitserveRefusing", {"stage": "proxy"}),
        ("SplitserveQueueWait", {"stage": "proxy"}),
        ("SplitserveErrorRatio", {"stage": "proxy", "model": "slow"}),
        ("SplitserveErrorBudgetBurnFast", {"slo": "availability"}),
        ("SplitserveJobsWait", {}),
    ]
    with load(watched, n_callers=40):
        for _ in range(20):
            assert watched.system.rest("/v2/models/slow/jobs", ROW)[0] == 202
        for name, labels in told:
            watched.webhook.wait_for("firing", name, **labels)

    for name, labels in told:
        assert_told_once(watched, name, **labels)


@contextmanager
def load(watched: Watched, n_callers: int) -> Iterator[None]:
    """So many callers, each with a request at a time."""
    is_over = threading.Event()

    def call() -> None:
        while not is_over.is_set():
            status, _ = watched.system.rest("/v2/models/slow/infer", ROW)
            is_over.wait(0.02 if status != 200 else 0)

    threads = [threading.Thread(target=call) for _ in range(n_callers)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


def test_a_certificate_that_is_about_to_expire(watched: Watched) -> None:
    """Within a day: the alert that says so two weeks before is not told as well."""
    end = datetime.now(UTC) + timedelta(hours=1)
    issued = watched.authority.issue_cert("127.0.0.1", not_after=end)
    replace(watched.certificate.cert, issued.cert_chain_pems[0].bytes())
    replace(watched.certificate.key, issued.private_key_pem.bytes())
    watched.webhook.wait_for("firing", "SplitserveCertificateExpired", use="admin")

    write(Path(watched.certificate.cert).parent, watched.authority)

    assert_told_once(watched, "SplitserveCertificateExpired", use="admin")


def test_settings_count_from_the_next_reload_on(watched: Watched) -> None:
    """A golden error beyond the threshold, and a bound of latency that is no bucket's: by another setting."""
    write_rules(watched.rules, {**THRESHOLDS, "golden_error_ratio": -1}, latency_bound="0.037")
    watched.prometheus.reload()
    told: list[tuple[str, dict[str, str]]] = [
        ("SplitserveGoldenErrorNearTolerance", {"model": "slow"}), ("SplitserveLatencyBoundUnknown", {"le": "0.037"})
    ]  # fmt: skip
    for name, labels in told:
        watched.webhook.wait_for("firing", name, **labels)

    write_rules(watched.rules, THRESHOLDS)
    watched.prometheus.reload()

    for name, labels in told:
        assert_told_once(watched, name, **labels)
