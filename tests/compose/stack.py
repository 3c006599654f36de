"""docker-compose.yml under test: a unique project name, free ports, its containers, their logs."""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from splitserve.pipeline.context import StepFailed
from splitserve.pipeline.docker import docker_client

ROOT = Path(__file__).parents[2]
SERVICES = ("proxy", "preprocess", "predict")
PATIENCE_S = 60.0


def find_docker() -> str:
    """A docker client that has compose and reaches a daemon; fails the test if there is none."""
    try:
        return docker_client()
    except StepFailed as error:
        pytest.fail(f"the compose tests need docker: {error}\n`make test` leaves these tests out.", pytrace=False)


def wait_until(claim: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
    """The first true value of ``claim``; fails after ``patience_s``, saying ``what`` did not come."""
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        if value := claim():
            return value
        threading.Event().wait(0.1)
    raise AssertionError(f"waited {patience_s} s in vain: {what}")


class Container:
    """One container of a stack."""

    def __init__(self, docker: str, identity: str) -> None:
        self._docker = docker
        self.identity = identity

    def facts(self) -> dict[str, Any]:
        """What ``docker inspect`` says."""
        facts: dict[str, Any] = json.loads(run([self._docker, "inspect", self.identity]))[0]
        return facts

    def lines(self) -> list[str]:
        """What it has written so far, standard output and standard error."""
        return run([self._docker, "logs", self.identity], stderr=subprocess.STDOUT).splitlines()

    def n_events(self, name: str) -> int:
        """How many log lines have this event."""
        return sum(json.loads(line)["event"] == name for line in self.lines() if line.startswith("{"))

    def try_python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the image's Python inside."""
        command = [self._docker, "exec", self.identity, "python", *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    def python(self, code: str) -> str:
        """What code prints, run inside."""
        answer = self.try_python("-c", code)
        assert answer.returncode == 0, answer.stderr
        return answer.stdout.strip()

    def signal(self, number: int) -> None:
        """Send the service itself a signal, not the process 1 over it. What ends by one is started again by docker."""
        self.python(f"import os; os.kill(int(open('/proc/1/task/1/children').read().split()[0]), {int(number)})")

    def start(self) -> None:
        """Start it again, and nothing that it depends on."""
        run([self._docker, "start", self.identity])

    def stop(self) -> None:
        """SIGTERM, and wait for its end."""
        run([self._docker, "stop", self.identity])

    def restart(self) -> None:
        """Stop it, start it, wait until it takes calls."""
        run([self._docker, "restart", self.identity])
        self.wait_until_healthy()

    def wait_until_healthy(self) -> None:
        wait_until(lambda: self.facts()["State"]["Health"]["Status"] == "healthy", f"{self.identity[:12]} healthy")

    def in_network(self, *command: str) -> str:
        """Run a command of this machine in the container's network, as root."""
        enter = ["nsenter", "--target", str(self.facts()["State"]["Pid"]), "--net", *command]
        return run(enter if os.geteuid() == 0 else ["sudo", "-n", *enter])

    @contextmanager
    def cut_off(self) -> Iterator[None]:
        """Every packet to and from it is dropped for a while, except on loopback."""
        rules = [("INPUT", "--in-interface"), ("OUTPUT", "--out-interface")]
        for chain, interface in rules:
            self.in_network("iptables", "--append", chain, "!", interface, "lo", "--jump", "DROP")
        try:
            yield
        finally:
            for chain, interface in rules:
                self.in_network("iptables", "--delete", chain, "!", interface, "lo", "--jump", "DROP")

    @contextmanager
    def slowed(self) -> Iterator[None]:
        """A bad link, for a while: sent packets are delayed, received ones partly lost.

        By netem where the kernel has it; else by a thin pipe with a queue in front, and a filter that drops at random.
        """
        device = self.in_network("ip", "route", "show", "default").split()[4]
        queue = ["tc", "qdisc", "add", "dev", device, "root"]
        lose = [
            "--in-interface",
            device,
            *["--match", "statistic", "--mode", "random", "--probability", "0.02", "--jump", "DROP"],
        ]
        try:
            self.in_network(*queue, "netem", "delay", "100ms", "20ms")
        except AssertionError:
            self.in_network(*queue, "tbf", "rate", "200kbit", "burst", "2kb", "latency", "400ms")
        self.in_network("iptables", "--append", "INPUT", *lose)
        try:
            yield
        finally:
            self.in_network("iptables", "--delete", "INPUT", *lose)
            self.in_network("tc", "qdisc", "delete", "dev", device, "root")

    @contextmanager
    def disconnected(self) -> Iterator[None]:
        """Disconnected from its network for a while: interface and name are gone; it may get another address."""
        ((network, facts),) = self.facts()["NetworkSettings"]["Networks"].items()
        run([self._docker, "network", "disconnect", network, self.identity])
        try:
            yield
        finally:
            aliases = [word for alias in facts["Aliases"] for word in ("--alias", alias)]
            run([self._docker, "network", "connect", *aliases, network, self.identity])


class Stack:
    """The services of docker-compose.yml.

    Args:
        docker: the client.
        project: a name that no other stack on this machine has.
        models: folder of the model repository.
        overlays: compose files that lie over docker-compose.yml, by their paths in the repository or absolute.
        n_proxies: for how many there are host ports.
        environment: variables for the compose files.
    """

    def __init__(
        self, docker: str, project: str, models: Path, *, overlays: Sequence[str] = (), n_proxies: int = 1, **environment: str
    ) -> None:
        self._docker = docker
        self._files = [word for name in ("docker-compose.yml", *overlays) for word in ("--file", str(ROOT / name))]
        self.project = project
        ports = free_ports(2 * n_proxies)
        self.http_ports, self.grpc_ports = ports[:n_proxies], ports[n_proxies:]
        self.http = f"http://127.0.0.1:{self.http_ports[0]}"
        self.grpc = f"127.0.0.1:{self.grpc_ports[0]}"
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("COMPOSE_", "SPLITSERVE_"))},
            "SPLITSERVE_MODELS": str(models),
            "SPLITSERVE_HTTP_PORT": f"{self.http_ports[0]}-{self.http_ports[-1]}",
            "SPLITSERVE_GRPC_PORT": f"{self.grpc_ports[0]}-{self.grpc_ports[-1]}",
            "SPLITSERVE_LOG_REQUESTS": "all",
            **environment,
        }

    def extended(self, *overlays: str, **environment: str) -> Stack:
        """The same project with more overlays and variables: `up` makes again what they change."""
        more = copy.copy(self)
        more._files = [*self._files, *(word for name in overlays for word in ("--file", str(ROOT / name)))]
        more._environment = {**self._environment, **environment}
        return more

    def compose(self, *arguments: str) -> str:
        """Run ``docker compose`` on this project."""
        project = ["--project-directory", str(ROOT), "--project-name", self.project]
        command = [self._docker, "compose", *self._files, *project, *arguments]
        return run(command, env=self._environment)

    def build(self) -> None:
        """Make the images."""
        self.compose("build")

    def up(self, **replicas: int) -> None:
        """Start missing replicas, stop surplus ones, wait until all are healthy. One replica of each by default."""
        scale = [word for name in SERVICES for word in ("--scale", f"{name}={replicas.get(name, 1)}")]
        try:
            self.compose("up", "--no-build", "--detach", "--wait", "--wait-timeout", "120", *scale)
        except AssertionError as failure:
            raise AssertionError(f"{failure}\n{self.compose('logs', '--tail', '50')}") from None

    def down(self) -> None:
        """Stop and remove the containers, the network and the images."""
        self.compose("down", "--volumes", "--rmi", "local", "--remove-orphans")

    def containers(self, service: str) -> list[Container]:
        """The containers of a service, stopped ones too."""
        return [Container(self._docker, line) for line in self.compose("ps", "--all", "--quiet", service).splitlines()]

    def container(self, service: str) -> Container:
        """The only container of a service."""
        (only,) = self.containers(service)
        return only

    def leftovers(self) -> dict[str, list[str]]:
        """What docker still has of this project, by kind."""
        label = f"label=com.docker.compose.project={self.project}"
        questions = {
            "containers": ["ps", "--all", "--quiet", "--filter", label],
            "networks": ["network", "ls", "--quiet", "--filter", label],
            "volumes": ["volume", "ls", "--quiet", "--filter", label],
            "images": ["images", "--quiet", "--filter", f"reference={self.project}-*"],
        }
        return {kind: run([self._docker, *question]).splitlines() for kind, question in questions.items()}


def run(command: Sequence[str], *, stderr: int = subprocess.PIPE, env: dict[str, str] | None = None) -> str:
    """What a command prints; fails with what it said if it fails."""
    answer = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=env)
    if answer.returncode:
        raise AssertionError(f"{' '.join(map(str, command))}: exit status {answer.returncode}\n{answer.stdout}\n{answer.stderr}")
    return answer.stdout


def free_ports(count: int) -> list[int]:
    """Free ports of loopback, one after the other."""
    while True:
        with ExitStack() as stack:
            first = stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
            ports = list(range(first, first + count))
            with suppress(OSError, OverflowError):
                for port in ports[1:]:
                    stack.enter_context(socket.create_server(("127.0.0.1", port)))
                return ports
