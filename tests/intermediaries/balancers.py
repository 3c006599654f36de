"""Third-party reverse proxies in front of two splitserve proxies, configured as in their documentation."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from tests.certificates import Files
from tests.clients.conftest import ENVIRONMENTS
from tests.system.processes import free_ports, wait_until

GRPC_RETRY_ON = "connect-failure,refused-stream,reset-before-request,unavailable"
HTTP_RETRY_ON = "connect-failure,reset,retriable-status-codes"
"""``reset``: a proxy that stops closes idle connections, perhaps as the next request is sent on them."""

PATH = f"{os.environ['PATH']}:/usr/sbin"


class Address(NamedTuple):
    """Ports of a proxy, or of a relay to one."""

    http_port: int
    grpc_port: int


class Balancer:
    """A process in front of the gRPC and REST ports of some backends; a subclass says which and how.

    Args:
        folder: for its configuration and logs.
        backends: what it balances over.
        tls: the files of its listeners; None: plain text.
    """

    name: ClassVar[str]

    def __init__(self, folder: Path, backends: Sequence[Address], tls: Files | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.backends = list(backends)
        self.tls = tls
        self.grpc_port, self.http_port, self.admin_port = free_ports(3)
        self.grpc, self.http = f"127.0.0.1:{self.grpc_port}", f"127.0.0.1:{self.http_port}"
        self._log = (folder / "output.log").open("wb")
        self._process = subprocess.Popen(self.command(), stdout=self._log, stderr=subprocess.STDOUT, cwd=folder)
        try:
            wait_until(self._listens, f"{self.name} listens")
            self.wait_until_healthy()
        except BaseException:
            self.stop()
            raise

    def command(self) -> list[str]:
        """Write the configuration; what to run."""
        raise NotImplementedError

    def wait_until_healthy(self, n_backends: int | None = None) -> None:
        """Until its health checks find so many backends, or all, on their gRPC and their REST port; at once if it makes none."""
        n_backends = len(self.backends) if n_backends is None else n_backends
        wait_until(lambda: all(sum(states) >= n_backends for states in self.states().values()), f"{self.name} finds them healthy")

    def states(self) -> dict[str, list[bool]]:
        """Whether each backend is healthy, on the gRPC and on the REST port."""
        return {}

    def _listens(self) -> bool:
        if self._process.poll() is not None:
            raise AssertionError(f"{self.name} ended: {(self.folder / 'output.log').read_text()[-4000:]}")
        for port in (self.grpc_port, self.http_port):
            try:
                socket.create_connection(("127.0.0.1", port)).close()
            except OSError:
                return False
        return True

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        self._log.close()

    def write(self, name: str, text: str) -> str:
        path = self.folder / name
        path.write_text(text)
        return str(path)


def program(name: str) -> str:
    found = shutil.which(name, path=PATH)
    assert found, f"{name} is not installed: run tests/intermediaries/install.sh"
    return found


class Nginx(Balancer):
    """With connections to the backends that are kept. Without health checks: it tries another backend when one fails."""

    name = "nginx"
    keepalive = "keepalive 32;"

    def command(self) -> list[str]:
        tls = self.tls and f"ssl_certificate {self.tls.cert}; ssl_certificate_key {self.tls.key};"
        ssl = "ssl " if tls else ""
        grpc, http = (
            "".join(f"server 127.0.0.1:{port} max_fails=0; " for port in ports)
            for ports in zip(*((each.grpc_port, each.http_port) for each in self.backends), strict=True)
        )
        temporary = "\n".join(
            f"  {kind}_temp_path {self.folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        return [
            program("nginx"), "-e", f"{self.folder}/error.log", "-c", self.write("nginx.conf", f"""
daemon off;
user root;
worker_processes 1;
pid {self.folder}/nginx.pid;
error_log {self.folder}/error.log info;
events {{ worker_connections 4096; }}
http {{
  access_log off;
{temporary}
  client_max_body_size 0;
  {tls or ""}
  upstream grpc_backends {{ {grpc}{self.keepalive} }}
  upstream http_backends {{ {http}{self.keepalive} }}
  server {{
    listen 127.0.0.1:{self.grpc_port} {ssl}http2;
    location / {{
      grpc_pass grpc://grpc_backends;
      grpc_next_upstream error timeout non_idempotent;
      grpc_read_timeout 600s;
    }}
  }}
  server {{
    listen 127.0.0.1:{self.http_port} {ssl};
    location / {{
      proxy_pass http://http_backends;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_next_upstream error timeout http_503 non_idempotent;
    }}
  }}
}}
"""),
        ]  # fmt: skip


class NginxWithoutKeepalive(Nginx):
    """nginx's default: one connection to a backend for each call."""

    name = "nginx without keepalive"
    keepalive = ""


class Haproxy(Balancer):
    """With health checks over HTTP on the REST port, and over HTTP/2 on the gRPC port where ``checks_grpc_port``."""

    name = "haproxy"
    checks_grpc_port = False

    def command(self) -> list[str]:
        crt = ""
        if self.tls:
            pem = self.write("haproxy.pem", Path(self.tls.cert).read_text() + Path(self.tls.key).read_text())
            crt = f"ssl crt {pem} alpn h2,http/1.1"
        grpc, http = [], []
        for number, each in enumerate(self.backends):
            check = "check inter 100ms fall 2 rise 1"
            grpc_check = check if self.checks_grpc_port else f"{check} port {each.http_port} check-proto h1"
            grpc.append(f"  server backend{number} 127.0.0.1:{each.grpc_port} proto h2 {grpc_check}")
            http.append(f"  server backend{number} 127.0.0.1:{each.http_port} {check}")
        ready = "  http-check send meth GET uri /v2/health/ready\n  http-check expect status 200"
        answers = "  http-check send meth GET uri /\n  http-check expect rstatus ^[2-4]"
        lines = "\n".join
        return [
            program("haproxy"), "-db", "-f", self.write("haproxy.cfg", f"""
global
  stats socket {self.folder}/admin level admin
  maxconn 4096
defaults
  mode http
  timeout connect 5s
  timeout client 600s
  timeout server 600s
  timeout check 3s
  retries 3
  option redispatch 1
  option httpchk
  option abortonclose
  retry-on conn-failure empty-response response-timeout 503
frontend grpc
  bind 127.0.0.1:{self.grpc_port} {crt or "proto h2"}
  default_backend grpc_backends
frontend http
  bind 127.0.0.1:{self.http_port} {crt}
  default_backend http_backends
backend grpc_backends
  balance roundrobin
{answers if self.checks_grpc_port else ready}
{lines(grpc)}
backend http_backends
  balance roundrobin
{ready}
{lines(http)}
"""),
        ]  # fmt: skip

    def states(self) -> dict[str, list[bool]]:
        with suppress(OSError):
            rows = list(csv.DictReader(self.ask("show stat").removeprefix("# ").splitlines()))
            return {
                name: [row["status"] == "UP" for row in rows if row["pxname"] == name and row["svname"].startswith("backend")]
                for name in ("grpc_backends", "http_backends")
            }
        return {"": [False]}

    def ask(self, command: str) -> str:
        """What the admin socket answers."""
        with socket.socket(socket.AF_UNIX) as admin:
            admin.connect(str(self.folder / "admin"))
            admin.sendall(f"{command}\n".encode())
            return b"".join(iter(lambda: admin.recv(65536), b"")).decode()


class HaproxyCheckingTheGrpcPort(Haproxy):
    """With health checks that GET over HTTP/2."""

    name = "haproxy checking the gRPC port"
    checks_grpc_port = True


class Envoy(Balancer):
    """Round robin, with retries; health checks by grpc.health.v1 on the gRPC port, by HTTP on the REST port."""

    name = "envoy"

    def command(self) -> list[str]:
        binary = ENVIRONMENTS / "envoy" / "bin" / "envoy"
        assert binary.exists(), "Envoy is not installed: run tests/intermediaries/install.sh"
        path = self.write("envoy.json", json.dumps(self._configuration()))
        return [str(binary), "-c", path, "--disable-hot-restart", "--concurrency", "1", "--log-level", "warning"]

    def states(self) -> dict[str, list[bool]]:
        with suppress(OSError):
            clusters = json.loads(self.ask("GET", "/clusters?format=json"))["cluster_statuses"]
            return {
                cluster["name"]: ["failed_active_health_check" not in host["health_status"] for host in cluster["host_statuses"]]
                for cluster in clusters
            }
        return {"": [False]}

    def ask(self, method: str, path: str) -> str:
        """What the admin listener answers."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.admin_port}{path}", method=method)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return str(answer.read().decode())

    def _configuration(self) -> dict[str, Any]:
        grpc_check = {"grpc_health_check": {}}
        http_check = {"http_health_check": {"path": "/v2/health/ready"}}
        return {
            "admin": {"address": _address(self.admin_port)},
            "static_resources": {
                "listeners": [
                    self._listener("grpc", self.grpc_port, "HTTP2", GRPC_RETRY_ON),
                    self._listener("http", self.http_port, "HTTP1", HTTP_RETRY_ON),
                ],
                "clusters": [
                    self._cluster("grpc", [each.grpc_port for each in self.backends], {"http2_protocol_options": {}}, grpc_check),
                    self._cluster("http", [each.http_port for each in self.backends], {"http_protocol_options": {}}, http_check),
                ],
            },
        }  # fmt: skip

    def _listener(self, name: str, port: int, codec: str, retry_on: str) -> dict[str, Any]:
        route = {
            "cluster": name,
            "timeout": "0s",
            "max_stream_duration": {"grpc_timeout_header_max": "0s"},
            "retry_policy": {
                "retry_on": retry_on,
                "retriable_status_codes": [503],
                "num_retries": 3,
                "retry_host_predicate": [
                    {
                        "name": "envoy.retry_host_predicates.previous_hosts",
                        "typed_config": {
                            "@type": _type("retry.host.previous_hosts.v3.PreviousHostsPredicate"),
                        },
                    }
                ],
                "host_selection_retry_max_attempts": 3,
            },
        }
        host = {"name": "all", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": route}]}
        router = {"@type": _type("filters.http.router.v3.Router")}
        manager = {
            "@type": _type("filters.network.http_connection_manager.v3.HttpConnectionManager"),
            "stat_prefix": name,
            "codec_type": codec,
            "stream_idle_timeout": "0s",
            "route_config": {"virtual_hosts": [host]},
            "http_filters": [{"name": "envoy.filters.http.router", "typed_config": router}],
        }  # fmt: skip
        chain: dict[str, Any] = {
            "filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}],
        }
        return {"name": name, "address": _address(port), "filter_chains": [chain]}

    def _cluster(self, name: str, ports: list[int], protocol: dict[str, Any], check: dict[str, Any]) -> dict[str, Any]:
        return {
            "name": name,
            "type": "STATIC",
            "connect_timeout": "5s",
            "lb_policy": "ROUND_ROBIN",
            "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
            "circuit_breakers": {"thresholds": [{"max_requests": 4096, "max_pending_requests": 4096, "max_retries": 4096}]},
            "typed_extension_protocol_options": {
                "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                    "@type": _type("upstreams.http.v3.HttpProtocolOptions"),
                    "explicit_http_config": protocol,
                }
            },
            "health_checks": [
                {
                    "timeout": "3s",
                    "interval": "0.1s",
                    "no_traffic_interval": "0.1s",
                    "unhealthy_interval": "0.1s",
                    "unhealthy_threshold": 2,
                    "healthy_threshold": 1,
                    **check,
                }
            ],
            "load_assignment": {
                "cluster_name": name,
                "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(port)}} for port in ports]}],
            },
        }


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def _type(name: str) -> str:
    return f"type.googleapis.com/envoy.extensions.{name}"
