"""``splitserve up``: starts all services as processes on this machine, in one terminal."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from splitserve.catalogue import why_not_ready
from splitserve.child_processes import ending_with_parent
from splitserve.cli.connection import connect
from splitserve.cli.serve import ADMIN_OFFSETS, MODULES
from splitserve.cli.tables import print_table
from splitserve.errors import SplitserveError
from splitserve.oip.messages import LOADING, READY, UNAVAILABLE, ModelState

STOP_TIMEOUT_S = 65.0
"""A service that has not exited by then is killed; longer than its grace periods, for jobs in flight and then for calls."""

REPORT_AFTER_S = 5.0
POLL_INTERVAL_S = 0.1
RESTART_DELAY_S = 1.0
ANY_ADDRESS = ("0.0.0.0", "::")  # noqa: S104 - recognised, not bound


class Ports(NamedTuple):
    """The ports of all listeners."""

    http: int
    grpc: int
    preprocess: int
    predict: int
    jobs: int
    admin: str = ""
    """Port of the admin listener of the proxy, or of the fused service; the others have those 10, 20 and 30 above. "0": any free
    ones; "off": none; "": those of the settings."""

    def admin_port(self, service: str) -> str:
        """That of a service."""
        if self.admin in ("", "0", "off"):
            return self.admin
        return str(int(self.admin) + ADMIN_OFFSETS[service])


class Service(NamedTuple):
    """One process to start: its name, settings and addresses. One that is not vital is started again if it ends."""

    name: str
    environment: Mapping[str, str]
    addresses: str
    is_vital: bool = True


def run(repository: str, *, host: str, ports: Ports, is_fused: bool, jobs_dir: str) -> int:
    """Start, wait, follow the logs, stop; 1 if a service exited unexpectedly. ``jobs_dir`` "": without jobs."""
    with tempfile.TemporaryDirectory(prefix="splitserve-") as folder:  # for this user only
        sockets = folder if may_use_sockets(os.environ) else ""
        return asyncio.run(_run(plan(repository, host, ports, is_fused, jobs_dir, sockets), repository, host, ports))


def may_use_sockets(environment: Mapping[str, str]) -> bool:
    """Whether the services can call each other over unix sockets: not with several workers, TLS, or sockets of the user's."""
    hops = ("PREPROCESS_", "PREDICT_", "PROXY_NEXT_")
    kept = [name for name in environment if name.startswith(hops) and name.endswith(("_WORKERS", "_FILE", "_SOCKET"))]
    return sys.platform != "win32" and not kept


def plan(repository: str, host: str, ports: Ports, is_fused: bool, jobs_dir: str = "", sockets_dir: str = "") -> list[Service]:
    """The services in the order in which they start; they stop in the reverse. Without ``sockets_dir`` the hops are TCP."""
    found = _plan(repository, host, ports, is_fused, jobs_dir)
    if sockets_dir and not is_fused:
        found = [_with(service, _socket_settings(service.name, sockets_dir)) for service in found]
    if not ports.admin:
        return found
    admin = {f"{service.upper()}_ADMIN_PORT": ports.admin_port(service) for service in ADMIN_OFFSETS}
    return [_with(service, admin) for service in found]


def _with(service: Service, settings: Mapping[str, str]) -> Service:
    return service._replace(environment={**service.environment, **settings})


def _plan(repository: str, host: str, ports: Ports, is_fused: bool, jobs_dir: str) -> list[Service]:
    proxy = {"PROXY_HOST": host, "PROXY_HTTP_PORT": str(ports.http), "PROXY_GRPC_PORT": str(ports.grpc)}
    models = {"MODEL_REPOSITORY": repository}
    edge = f"{_scheme()}://{host}:{ports.http} (REST), {host}:{ports.grpc} (gRPC)"
    if is_fused:
        jobs = {"JOBS_DIR": "", "JOBS_DATABASE_URL": ""}
        if jobs_dir:  # the port is used with several workers only
            jobs = {"JOBS_DIR": jobs_dir, "JOBS_GRPC_PORT": str(ports.jobs)}
        return [Service("fused", {**proxy, **models, **jobs}, edge)]
    more = []
    if jobs_dir:
        proxy["PROXY_JOBS_TARGET"] = f"127.0.0.1:{ports.jobs}"
        environment = {
            "JOBS_DIR": jobs_dir,
            "JOBS_GRPC_PORT": str(ports.jobs),
            "JOBS_PROXY_TARGET": f"{'127.0.0.1' if host in ANY_ADDRESS else host}:{ports.grpc}",
        }
        more = [Service("jobs", environment, f"127.0.0.1:{ports.jobs} (gRPC), {jobs_dir}", is_vital=False)]
    return [
        Service("predict", {**models, "PREDICT_GRPC_PORT": str(ports.predict)}, f"127.0.0.1:{ports.predict} (gRPC)"),
        Service(
            "preprocess",
            {
                **models,
                "PREPROCESS_GRPC_PORT": str(ports.preprocess),
                "PREPROCESS_PREDICT_TARGET": f"127.0.0.1:{ports.predict}",
            },
            f"127.0.0.1:{ports.preprocess} (gRPC)",
        ),
        Service("proxy", {**proxy, "PROXY_PREPROCESS_TARGET": f"127.0.0.1:{ports.preprocess}"}, edge),
        *more,
    ]


def _socket_settings(service: str, folder: str) -> dict[str, str]:
    """The settings with which a service listens on a unix socket too, and calls the next one over its own."""
    settings = {
        "predict": {"PREDICT_GRPC_SOCKET": f"{folder}/predict"},
        "preprocess": {"PREPROCESS_GRPC_SOCKET": f"{folder}/preprocess", "PREPROCESS_PREDICT_TARGET": f"unix:{folder}/predict"},
        "proxy": {"PROXY_PREPROCESS_TARGET": f"unix:{folder}/preprocess"},
    }
    return settings.get(service, {})


def _scheme() -> str:
    return "https" if os.environ.get("PROXY_TLS_CERT_FILE") else "http"


async def _run(services: Sequence[Service], repository: str, host: str, ports: Ports) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    fleet = _Fleet()
    try:
        for service in services:
            await fleet.start(service)
        stopping = asyncio.create_task(stop.wait())
        failing = asyncio.create_task(fleet.first_end())
        welcome = asyncio.create_task(
            _welcome(services, fleet, repository, f"{_scheme()}://{host}:{ports.http}", f"{host}:{ports.grpc}", ports.admin)
        )
        await asyncio.wait((stopping, failing), return_when=asyncio.FIRST_COMPLETED)
        welcome.cancel()
        await asyncio.gather(welcome, return_exceptions=True)
        if failing.done():
            print(f"{failing.result()} exited unexpectedly; its log above says why", file=sys.stderr)
            return 1
        print("\nstopping", flush=True)
        return 0
    finally:
        await fleet.stop()
        print("stopped", flush=True)


class _Fleet:
    """Child processes, with their output copied to standard output."""

    def __init__(self) -> None:
        self.processes: dict[str, asyncio.subprocess.Process] = {}
        self._followers: list[asyncio.Task[None]] = []
        self._vital: list[str] = []
        self._restarting: list[asyncio.Task[None]] = []

    async def start(self, service: Service) -> None:
        """In a session of its own: Ctrl-C reaches this process only, which stops the others in order. If this one is killed, they
        stop, too.
        """
        defaults = {"LOG_FORMAT": "text" if sys.stdout.isatty() else "json"}
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", MODULES[service.name],
            env={**defaults, **os.environ, **service.environment},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=ending_with_parent(),
        )  # fmt: skip
        self.processes[service.name] = process
        if service.is_vital:
            self._vital.append(service.name)
        else:
            self._restarting.append(asyncio.create_task(self._restart(service, process)))
        self._followers.append(asyncio.create_task(self._follow(service.name, process)))

    async def _follow(self, name: str, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None, "start pipes it"
        async for line in process.stdout:
            print(f"{name:<10} | {line.decode(errors='replace').rstrip()}", flush=True)

    async def _restart(self, service: Service, process: asyncio.subprocess.Process) -> None:
        """Start a process again once it has ended. Nothing else stops because of it."""
        await process.wait()
        print(f"{service.name} exited unexpectedly; its log above says why; starting it again", file=sys.stderr, flush=True)
        await asyncio.sleep(RESTART_DELAY_S)
        await self.start(service)

    async def first_end(self) -> str:
        """Name of the first process to end of those without which nothing works."""
        waits = {asyncio.create_task(self.processes[name].wait()): name for name in self._vital}
        done, rest = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for task in rest:
            task.cancel()
        return waits[done.pop()]

    async def stop(self) -> None:
        """Stop in reverse order of start, one after the other, so that no call in flight loses its next stage."""
        for task in self._restarting:
            task.cancel()
        for process in reversed(self.processes.values()):
            if process.returncode is None:
                process.terminate()
                try:
                    await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
                except TimeoutError:
                    process.kill()
                    await process.wait()
        await asyncio.gather(*self._followers, return_exceptions=True)


async def _welcome(
    services: Sequence[Service], fleet: _Fleet, repository: str, http_url: str, grpc_url: str, admin_port: str
) -> None:
    """Wait until everything is loaded, then print the services and example calls."""
    states = await _loaded_models(grpc_url)
    models = sorted({state.name for state in states if state.state == READY})
    example = await asyncio.to_thread(_example, repository, models)
    print()
    print_table(
        ("service", "address", "pid"),
        [(service.name, service.addresses, str(fleet.processes[service.name].pid)) for service in services],
    )
    print(f"\nmodels: {', '.join(models)}")
    for line in refusals(states):
        print(line)
    print()
    if example:
        model, instance = example
        body = json.dumps({"instances": [instance]})
        print(f"REST   curl -s {http_url}/v1/models/{model}:predict -d {shlex.quote(body)}")
        command = shlex.join([_own_command(), "infer", model, "--url", grpc_url, "--rows", json.dumps([instance])])
        print(f"gRPC   {command}")
        if any(service.environment.get("JOBS_DIR") for service in services):
            options = ["--url", grpc_url, "--rows", json.dumps([instance]), "--wait"]
            print(f"job    {shlex.join([_own_command(), 'jobs', 'submit', model, *options])}")
    if (admin_port or os.environ.get("PROXY_ADMIN_PORT")) not in ("0", "off"):
        print(f"top    {shlex.join([_own_command(), 'top', *(['--admin-port', admin_port] if admin_port else [])])}")
    print(f"docs   {http_url}/docs\n\nCtrl-C stops everything.\n", flush=True)


def refusals(states: Iterable[ModelState]) -> list[str]:
    """A line for each version that is not ready, with its reason."""
    return [f"not ready: {state.name} {state.version}: {state.reason}" for state in states if state.state == UNAVAILABLE]


async def _loaded_models(grpc_url: str) -> Sequence[ModelState]:
    """The index, once a model is ready and none is loading; prints meanwhile what it waits for."""
    started, reported = time.monotonic(), ""
    async with connect(grpc_url) as proxy:
        while True:
            try:
                states = await proxy.index()
                reason = await proxy.not_ready_reason() or why_not_ready(states)
            except SplitserveError as error:
                states, reason = [], error.message
            loading = [f"{state.name} {state.version}" for state in states if state.state == LOADING]
            if not reason and not loading:
                return states
            reason = reason or f"loading {', '.join(loading)}"
            if reason != reported and time.monotonic() - started > REPORT_AFTER_S:
                reported = reason
                print(f"waiting: {reason}", flush=True)
            await asyncio.sleep(POLL_INTERVAL_S)


def _example(repository: str, models: Sequence[str]) -> tuple[str, Any] | None:
    """A model and one of its golden samples as a V1 instance; of all models the shortest."""
    from splitserve.cli.samples import golden_instance

    instances = {model: golden_instance(repository, model) for model in models}
    shown = {model: json.dumps(instance) for model, instance in instances.items() if instance is not None}
    model = min(shown, key=lambda name: (not isinstance(instances[name], dict), len(shown[name])), default=None)
    return None if model is None else (model, instances[model])


def _own_command() -> str:
    """The path of this program as the user would type it."""
    path = Path(sys.argv[0])
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
