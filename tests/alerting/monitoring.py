"""Prometheus and Alertmanager as processes on loopback, and what receives their alerts."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import threading
import urllib.parse
import urllib.request
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tests.alerting.rule_files import PROMETHEUS, read, seconds
from tests.system.processes import free_ports, wait_until

SCALE = 120
"""Durations of the rules are so many times shorter: windows of five minutes are 2.5 s."""

SCRAPE_INTERVAL = "500ms"
EVALUATION_INTERVAL = "250ms"
_DURATION = re.compile(r"(?<=\[)\d+[smhd](?=\])|(?<=for: )\d+[smhd]|(?<=interval: )\d+[smhd]")


def write_rules(folder: Path, thresholds: Mapping[str, float], *, latency_bound: str = "0.5") -> None:
    """The shipped rules, faster, with other settings."""
    for name in ("rules.yml", "alerts.yml"):
        text = _DURATION.sub(lambda found: f"{seconds(found[0]) * 1000 // SCALE}ms", (PROMETHEUS / name).read_text())
        (folder / name).write_text(text.replace("30 * sum_over_time", f"{30 / SCALE} * sum_over_time"))
    settings = read("settings.yml")
    for rule in settings["groups"][0]["rules"]:
        if (of := rule.get("labels", {}).get("of")) in thresholds:
            rule["expr"] = f"vector({thresholds[of]})"
        if rule["record"] == "splitserve:slo:latency_bound":
            rule["labels"]["le"] = latency_bound
    (folder / "settings.yml").write_text(yaml.safe_dump(settings))


class Program:
    """A process with its output in a file, and an HTTP API."""

    def __init__(self, command: list[str], folder: Path, url: str) -> None:
        self.url = url
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        wait_until(self.is_ready, f"{command[0]} is ready")

    def is_ready(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=10):
                return True
        except OSError:
            return False

    def reload(self) -> None:
        """Read the configuration again."""
        self._process.send_signal(signal.SIGHUP)

    def get(self, path: str, **parameters: str) -> Any:
        """The field ``data`` of an answer."""
        with urllib.request.urlopen(f"{self.url}{path}?{urllib.parse.urlencode(parameters)}", timeout=30) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series of an expression now."""
        found: list[dict[str, Any]] = self.get("/api/v1/query", query=expression)["result"]
        return found

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)


def start_prometheus(
    folder: Path, targets: list[dict[str, Any]], *, alertmanager: str = "", scrape_interval: str = SCRAPE_INTERVAL
) -> Program:
    """With the rules in ``folder``; targets as in `static_configs`."""
    (port,) = free_ports(1)
    config = {
        "global": {"scrape_interval": scrape_interval, "evaluation_interval": EVALUATION_INTERVAL},
        "rule_files": ["settings.yml", "rules.yml", "alerts.yml"],
        "scrape_configs": [{"job_name": "splitserve", "tls_config": {"insecure_skip_verify": True}, "static_configs": targets}],
    }
    if alertmanager:
        config["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}]}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = ["prometheus", "--config.file=prometheus.yml", f"--web.listen-address=127.0.0.1:{port}", "--storage.tsdb.path=data"]
    return Program([*command, "--rules.alert.resend-delay=1s"], folder, f"http://127.0.0.1:{port}")


def start_alertmanager(folder: Path, webhook: str) -> Program:
    """The shipped configuration with its example of a receiver, which is told sooner."""
    text = (PROMETHEUS / "alertmanager.yml").read_text()
    text, n_receivers = re.subn(r"# (webhook_configs: .*url: )\"[^\"]*\"", rf'\1"{webhook}"', text)
    assert n_receivers == 1
    text = text.replace("group_wait: 10s", "group_wait: 100ms").replace("group_interval: 1m", "group_interval: 250ms")
    (folder / "alertmanager.yml").write_text(text)
    (port,) = free_ports(1)
    command = ["prometheus-alertmanager", "--config.file=alertmanager.yml", f"--web.listen-address=127.0.0.1:{port}"]
    command += ["--cluster.listen-address=", "--storage.path=alertmanager-data"]
    return Program(command, folder, f"http://127.0.0.1:{port}")


class Notice(NamedTuple):
    """An alert in a message to the webhook."""

    name: str
    status: str
    labels: dict[str, str]
    began: str
    annotations: dict[str, str]

    def is_repeated_by(self, other: Notice) -> bool:
        """Whether it says the same; a value in its annotations may have changed."""
        return self[:-1] == other[:-1]


class Webhook:
    """Receives alerts while entered."""

    def __init__(self) -> None:
        self._notices: list[Notice] = []
        self._arrived = threading.Condition()
        webhook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                webhook.receive(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"

    def __enter__(self) -> Webhook:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def receive(self, message: dict[str, Any]) -> None:
        with self._arrived:
            for alert in message["alerts"]:
                labels = alert["labels"]
                notice = Notice(labels["alertname"], alert["status"], labels, alert["startsAt"], alert["annotations"])
                if not any(known.is_repeated_by(notice) for known in self._notices):  # messages have all alerts of a group
                    self._notices.append(notice)
            self._arrived.notify_all()

    def notices(self, name: str, **labels: str) -> list[Notice]:
        """Those of an alert, in the order in which they came."""
        with self._arrived:
            return [notice for notice in self._notices if notice.name == name and labels.items() <= notice.labels.items()]

    def wait_for(self, status: str, name: str, **labels: str) -> Notice:
        """The first notice with a status."""

        def found() -> list[Notice]:
            return [notice for notice in self.notices(name, **labels) if notice.status == status]

        return wait_until(found, f"{name} {labels} {status}")[0]  # type: ignore[no-any-return]
