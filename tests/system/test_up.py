"""``splitserve up``: what a new user runs first."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.demo_models import Demos
from tests.system.processes import free_ports, wait_until

COMMAND = Path(sys.executable).with_name("splitserve")
PORT_OPTIONS = ("--http-port", "--grpc-port", "--preprocess-port", "--predict-port", "--jobs-port")


class Up:
    """A running ``splitserve up``; what it prints goes to a file."""

    def __init__(self, repository: Path, output: Path, *options: str) -> None:
        self.ports = free_ports(5)
        arguments = [part for name, port in zip(PORT_OPTIONS, self.ports, strict=True) for part in (name, str(port))]
        arguments += ["--jobs-dir", str(output.with_name("jobs")), "--admin-port", "off"]
        self._output = output
        with output.open("w") as stdout:
            self.process = subprocess.Popen(
                [COMMAND, "up", "--repository", repository, *arguments, *options], stdout=stdout, stderr=subprocess.STDOUT
            )

    @property
    def text(self) -> str:
        return self._output.read_text()

    def wait_for(self, text: str) -> str:
        wait_until(lambda: text in self.text or self.process.poll() is not None, f"{text!r} in {self.text}")
        assert text in self.text
        return self.text

    def is_listening(self) -> list[bool]:
        """For each port, whether anything does."""
        found = []
        for port in self.ports:
            with socket.socket() as probe:
                found.append(probe.connect_ex(("127.0.0.1", port)) == 0)
        return found


@pytest.fixture(params=[(), ("--fused",)], ids=["split", "fused"])
def up(request: pytest.FixtureRequest, demos: Demos, tmp_path: Path) -> Iterator[Up]:
    running = Up(demos.repository, tmp_path / "output", *request.param)
    yield running
    if running.process.poll() is None:
        running.process.terminate()
        running.process.wait(60)


def test_up_prints_an_example_call_and_stops_on_ctrl_c(up: Up) -> None:
    """A table of what runs where, calls that work as they are pasted, the page of the API; then a clean end."""
    text = up.wait_for("Ctrl-C stops everything.")

    rest = subprocess.run(re.search(r"REST +(.*)", text)[1], shell=True, check=True, capture_output=True, text=True)
    grpc = subprocess.run(re.search(r"gRPC +(.*)", text)[1], shell=True, check=True, capture_output=True, text=True)
    job = subprocess.run(re.search(r"job +(.*)", text)[1], shell=True, check=True, capture_output=True, text=True)
    page = re.search(r"docs +(\S+)", text)[1]
    document = subprocess.run(["curl", "-sf", page], check=True, capture_output=True, text=True).stdout
    up.process.send_signal(signal.SIGINT)

    assert json.loads(rest.stdout)["predictions"][0]["label"] == "Adelie"
    assert "Adelie" in grpc.stdout
    assert "Adelie" in job.stdout
    assert "openapi.json" in document
    assert "models: breast-cancer, digits, penguins" in text
    assert up.process.wait(60) == 0
    assert not any(up.is_listening())
    assert up.text.rstrip().endswith("stopped")


def test_up_exits_when_a_service_exits(demos: Demos, tmp_path: Path) -> None:
    """Exit status 1, the service named, and nothing left running."""
    up = Up(demos.repository, tmp_path / "output")
    up.wait_for("Ctrl-C stops everything.")
    pid = int(re.search(r"preprocess +127.0.0.1:\d+ \(gRPC\) +(\d+)", up.text)[1])

    subprocess.run(["kill", "-9", str(pid)], check=True)

    assert up.process.wait(60) == 1
    assert "preprocess exited unexpectedly" in up.text
    assert not any(up.is_listening())


def test_services_stop_when_up_is_killed(demos: Demos, tmp_path: Path) -> None:
    """Their ports are free for the next one."""
    up = Up(demos.repository, tmp_path / "output")
    up.wait_for("Ctrl-C stops everything.")

    up.process.kill()
    up.process.wait()

    wait_until(lambda: not any(up.is_listening()), "the services' end")


def test_up_starts_jobs_again_when_they_exit(demos: Demos, tmp_path: Path) -> None:
    """Nothing else stops because of it, and what was submitted is still there."""
    up = Up(demos.repository, tmp_path / "output")
    text = up.wait_for("Ctrl-C stops everything.")
    job = re.search(r"job +(.*)", text)[1]
    submitted = subprocess.run(job.replace(" --wait", ""), shell=True, check=True, capture_output=True, text=True).stdout.strip()
    pid = int(re.search(r"jobs +127.0.0.1:\d+ \(gRPC\), \S+ +(\d+)", text)[1])

    subprocess.run(["kill", "-9", str(pid)], check=True)
    wait_until(lambda: up.text.count('"jobs open"') == 2, "the second start of jobs")
    wait_until(lambda: subprocess.run(job, shell=True, capture_output=True).returncode == 0, "a job that is answered")
    shown = subprocess.run(
        [COMMAND, "jobs", "result", submitted, "--url", f"127.0.0.1:{up.ports[1]}"], check=True, capture_output=True, text=True
    )
    up.process.send_signal(signal.SIGTERM)

    assert "Adelie" in shown.stdout
    assert "jobs exited unexpectedly" in up.text
    assert up.process.wait(60) == 0
    assert not any(up.is_listening())


def test_up_without_jobs(demos: Demos, tmp_path: Path) -> None:
    """They are refused, by the name of the setting, and no folder is made."""
    up = Up(demos.repository, tmp_path / "output", "--fused", "--no-jobs")
    text = up.wait_for("Ctrl-C stops everything.")

    refused = subprocess.run([COMMAND, "jobs", "list", "--url", f"127.0.0.1:{up.ports[1]}"], capture_output=True, text=True)
    up.process.send_signal(signal.SIGTERM)

    assert "PROXY_JOBS_TARGET" in refused.stderr
    assert "job " not in text.partition("REST")[2]
    assert not (tmp_path / "jobs").exists()
    assert up.process.wait(60) == 0


def test_up_prints_what_it_waits_for(tmp_path: Path) -> None:
    """An empty repository is no error: the services wait for a model to be published."""
    (tmp_path / "models").mkdir()
    up = Up(tmp_path / "models", tmp_path / "output", "--fused")

    up.wait_for("waiting: the proxy service is not ready: no models found")
    up.process.send_signal(signal.SIGTERM)

    assert up.process.wait(60) == 0
