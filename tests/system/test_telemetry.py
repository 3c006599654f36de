"""Metrics of real processes: a request through three services, and through several workers."""

from __future__ import annotations

import json
import os
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.command_line import run_command
from tests.demo_models import Demos
from tests.system.processes import PATIENCE_S, Process, System, free_ports, wait_until


def scrape(port: int) -> dict[tuple[str, ...], float]:
    """Values by name and labels, in alphabetical order of the labels' names."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_S) as answer:
        text = answer.read().decode()
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture(scope="module")
def system(demos: Demos) -> Iterator[System]:
    ports = {f"{service}_ADMIN_PORT": "0" for service in ("PROXY", "PREPROCESS", "PREDICT")}
    system = System(demos.repository, MODELS="breast-cancer", **ports)
    yield system
    system.stop()


def test_a_request_is_counted_at_each_stage(system: System, demos: Demos) -> None:
    """With the release at the proxy and at preprocess, and the predictor's version at predict."""
    ports = {name: process.wait_for("listening")["admin_port"] for name, process in system.processes.items()}
    wait_until(lambda: system.rest("/v2/models/breast-cancer/ready")[0] == 200, "the model is ready")
    metadata = system.rest("/v2/models/breast-cancer")[1]
    inputs = [
        {"name": each["name"], "datatype": each["datatype"], "shape": [1, *each["shape"][1:]], "data": [1.0] * each["shape"][-1]}
        for each in metadata["inputs"]
    ]
    # Until a stream is open the next service gets unary calls, and counts them as such.
    for name, following in (("proxy", "preprocess"), ("preprocess", "predict")):
        opened = ("splitserve_streams_opened_total", name, following)
        wait_until(lambda port=ports[name], opened=opened: scrape(port)[opened], f"the stream to {following}")
    before = {name: scrape(port) for name, port in ports.items()}

    status, answer = system.rest("/v2/models/breast-cancer/infer", {"inputs": inputs})

    assert status == 200, answer
    release = answer["model_version"]
    for name, version, requests in (
        ("proxy", release, "rest"),
        ("preprocess", release, "stream"),
        ("predict", release.partition(".")[2], "stream"),
    ):
        after = scrape(ports[name])
        succeeded = ("splitserve_inferences_total", "breast-cancer", "succeeded", version, name)
        answered = ("splitserve_requests_total", "OK", "breast-cancer", requests, version, name)
        assert (before[name][succeeded], after[succeeded]) == (0, 1)  # at predict, golden samples are not counted
        assert after[answered] == before[name][answered] + 1
        assert after["process_cpu_seconds_total",] > 0
    assert scrape(ports["proxy"])["splitserve_replicas", "proxy", "ready", "preprocess"] == 1
    assert scrape(ports["predict"])["splitserve_loads_total", "loaded", "predict"] >= 1


def test_top_shows_every_stage_and_release(system: System) -> None:
    """From the admin listeners of three processes."""
    ports = [process.wait_for("listening")["admin_port"] for process in system.processes.values()]
    wait_until(lambda: system.rest("/v2/models/breast-cancer/ready")[0] == 200, "the model is ready")

    result = run_command("top", "--once", "--json", "--interval", "0.1", *(f"-u{port}" for port in ports))

    assert result.exit_code == 0, result.output
    view = json.loads(result.stdout)
    assert [stage["stage"] for stage in view["stages"] if stage["is_ready"]] == ["proxy", "preprocess", "predict"]
    assert {(each["stage"], each["model"]) for each in view["releases"] if each["ready_since"]} == {
        (stage, "breast-cancer") for stage in ("proxy", "preprocess", "predict")
    }
    [golden] = {each["golden_error_ratio"] for each in view["releases"] if each["stage"] == "preprocess"}
    assert 0 <= golden <= 1


def test_one_scrape_covers_all_workers(demos: Demos) -> None:
    """Also after one was killed: what it had counted stays in the sums."""
    http, grpc = free_ports(2)
    process = Process(
        "fused_service",
        {
            "MODEL_REPOSITORY": str(demos.repository), "MODELS": "breast-cancer", "PROXY_WORKERS": "2", "PROXY_ADMIN_PORT": "0",
            "PROXY_HTTP_PORT": str(http), "PROXY_GRPC_PORT": str(grpc),
        },
    )  # fmt: skip
    try:
        port = process.wait_for("admin listening")["admin_port"]
        wait_until(lambda: len(process.events("listening")) == 2, "both workers listen")
        wait_until(lambda: workers_up(port) == [1, 1], "both workers answer")
        for _ in range(5):
            with pytest.raises(urllib.error.HTTPError):
                urllib.request.urlopen(f"http://127.0.0.1:{http}/v2/models/none/infer", b'{"inputs": []}', timeout=PATIENCE_S)
        counted = scrape(port)[NOT_FOUND]
        started = {key: value for key, value in scrape(port).items() if key[0] == "process_start_time_seconds"}

        os.kill(children(process.pid)[0], signal.SIGKILL)
        wait_until(
            lambda: (
                workers_up(port) == [1, 1]
                and {key: value for key, value in scrape(port).items() if key[0] == "process_start_time_seconds"} != started
            ),
            "the worker is there again",
        )

        assert counted == 5 == scrape(port)[NOT_FOUND]
    finally:
        assert process.stop() == 0


NOT_FOUND = ("splitserve_requests_total", "NOT_FOUND", "unknown", "rest", "", "proxy")


def workers_up(port: int) -> list[float]:
    return [value for key, value in scrape(port).items() if key[0] == "splitserve_worker_up"]


def children(pid: int) -> list[int]:
    """In the order in which they were started: the workers, then the process of the admin listener."""
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
