"""The files of deploy/prometheus and deploy/grafana, as tests read and change them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy/prometheus"
GRAFANA = ROOT / "deploy/grafana"
LONGEST_SCRAPE_INTERVAL_S = 60

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def read(name: str) -> Any:
    """A YAML file of deploy/prometheus."""
    return yaml.safe_load((PROMETHEUS / name).read_text())


def rules(name: str) -> list[dict[str, Any]]:
    """The rules of all groups of a file."""
    return [rule for group in read(name)["groups"] for rule in group["rules"]]


def seconds(duration: str) -> int:
    """Of a duration as Prometheus writes it, with one unit."""
    return int(duration[:-1]) * _SECONDS[duration[-1]]


def windows(expression: str) -> list[int]:
    """The windows of an expression, in seconds."""
    return [seconds(found) for found in re.findall(r"\[(\d+[smhd])\]", expression)]
