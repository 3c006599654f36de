"""docker-compose.telemetry.yml: Prometheus finds every service, its rules work, and Alertmanager is known to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.compose.conftest import Model, started
from tests.compose.stack import ROOT, Stack, wait_until

pytestmark = [pytest.mark.compose, pytest.mark.xdist_group("compose"), pytest.mark.timeout(600)]

OVERLAYS = ["docker-compose.jobs.yml", "docker-compose.telemetry.yml", "tests/compose/telemetry.yml"]
FOUR = {"proxy", "preprocess", "predict", "jobs"}


@pytest.fixture(scope="module")
def stack(docker: str, project: str, repository: Path, models: dict[str, Model]) -> Iterator[Stack]:
    name = f"{project}-telemetry"
    stack = Stack(docker, name, repository, overlays=OVERLAYS, SPLITSERVE_PROMETHEUS_PORT="0", SPLITSERVE_ALERTMANAGER_PORT="0")
    with started(stack, models) as running:
        yield running


def get(url: str, path: str, **parameters: str) -> Any:
    return httpx.get(f"http://{url}{path}", params=parameters, timeout=30).json()["data"]


def test_all_services_are_scraped(stack: Stack) -> None:
    """Jobs too, which share the proxy's network; no rule fails, and Prometheus knows Alertmanager."""
    prometheus = stack.compose("port", "prometheus", "9090").strip()
    assert stack.compose("port", "alertmanager", "9093").startswith("127.0.0.1:")

    def stages() -> set[str]:
        found = get(prometheus, "/api/v1/query", query="splitserve_ready == 1")["result"]
        return {series["metric"]["stage"] for series in found}

    wait_until(lambda: stages() == FOUR, "all services are scraped and ready")
    wait_until(lambda: get(prometheus, "/api/v1/query", query="splitserve:threshold")["result"], "rules are evaluated")
    rules = [rule for group in get(prometheus, "/api/v1/rules")["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in rules} <= {"ok", "unknown"}
    managers = get(prometheus, "/api/v1/alertmanagers")["activeAlertmanagers"]
    assert [manager["url"] for manager in managers] == ["http://alertmanager:9093/api/v2/alerts"]


def test_grafana_is_given_the_dashboards() -> None:
    """By files that lie where its configuration says; the stack above has no image of it."""
    compose = yaml.safe_load((ROOT / "docker-compose.telemetry.yml").read_text())
    mounts = dict(volume.split(":")[:2][::-1] for volume in compose["services"]["grafana"]["volumes"])
    provider = yaml.safe_load((ROOT / "deploy/grafana/provisioning/dashboards/splitserve.yml").read_text())["providers"][0]

    folder = ROOT / mounts[provider["options"]["path"]]

    assert {path.stem for path in folder.glob("*.json")} == {"overview", "model", "stages", "jobs"}
    home = compose["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (folder / Path(home).name).exists()
