"""Grafana's dashboards: valid whether imported or provisioned, and every expression has data from real services."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import pytest

from tests.alerting.conftest import ROW, Watched
from tests.alerting.rule_files import GRAFANA, rules
from tests.system.processes import wait_until

pytestmark = [pytest.mark.alerting, pytest.mark.timeout(300)]

NAMES = ("jobs", "model", "overview", "stages")
DASHBOARDS: dict[str, Any] = {name: json.loads((GRAFANA / f"{name}.json").read_text()) for name in NAMES}
QUIET = {
    "jobs": set[str](),
    "model": set[str](),
    "overview": {"Releases not ready", "Days until certificates expire"},
    "stages": {"Telemetry failures"},
}
"""Panels that show nothing while all is well, by dashboard; and that of certificates, if there is TLS."""


def panels(name: str) -> list[tuple[str, str]]:
    """The title of each panel, with each of its expressions."""
    return [(panel["title"], target["expr"]) for panel in DASHBOARDS[name]["panels"] for target in panel["targets"]]


def test_there_is_a_test_for_each_dashboard() -> None:
    """A new one has to be named here."""
    assert {path.stem for path in GRAFANA.glob("*.json")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_dashboard_works_imported_and_provisioned(name: str) -> None:
    """A provisioned dashboard has no `__inputs`, and no id; the data source is a variable, and so are job and instance."""
    text = (GRAFANA / f"{name}.json").read_text()
    dashboard = DASHBOARDS[name]
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}

    assert "__inputs" not in text
    assert "DS_" not in text
    assert dashboard["id"] is None
    assert dashboard["uid"] == f"splitserve-{name}"
    assert len(dashboard["uid"]) < 40
    assert variables["datasource"]["type"] == "datasource"
    assert {"job", "instance"} <= set(variables)
    for variable in variables.values():
        assert variable["type"] == "datasource" or (variable["includeAll"] and variable["allValue"] == ".*")
    sources = [each["datasource"] for panel in dashboard["panels"] for each in (panel, *panel["targets"])]
    sources += [variable["datasource"] for variable in variables.values() if variable["type"] == "query"]
    assert {source["uid"] for source in sources} == {"${datasource}"}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


@pytest.mark.parametrize("name", NAMES)
def test_rates_follow_the_interval_of_scrapes(name: str) -> None:
    """`$__rate_interval` holds four scrapes at least, whatever their interval is."""
    ranges = {found for _, expression in panels(name) for found in re.findall(r"\[([^\]]*)\]", expression)}

    assert ranges <= {"$__rate_interval"}


def expanded(expression: str, values: dict[str, str], rate_interval: str = "4s") -> str:
    """An expression as Grafana sends it."""
    expression = expression.replace("$__rate_interval", rate_interval)
    return re.sub(r"\$(\w+)", lambda found: values[found[1]], expression)


def values_of(watched: Watched, name: str) -> dict[str, list[str]]:
    """The values of each variable as Grafana sends it: All, one, and two."""
    found = {}
    for variable in DASHBOARDS[name]["templating"]["list"]:
        if variable["type"] != "query":
            continue
        match = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
        assert match is not None
        series = watched.prometheus.query(expanded(match[1], {"job": ".*"}))
        known = sorted({each["metric"][match[2]] for each in series})
        assert known, variable["name"]
        found[variable["name"]] = [".*", known[0], f"({'|'.join([*known, 'other'][:2])})"]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_expression_has_data(watched: Watched, name: str) -> None:
    """From the real services, with All of each variable; and with one value or two it is valid at least."""
    watched.system.rest("/v2/models/slow/infer", ROW)
    choices = values_of(watched, name)

    def empty() -> list[tuple[str, str]]:
        return [
            (title, expression)
            for title, expression in panels(name)
            if title not in QUIET[name] and not watched.prometheus.query(expanded(expression, dict.fromkeys(choices, ".*")))
        ]

    def all_have_data() -> bool:
        assert watched.system.rest("/v2/models/slow/infer", ROW)[0] in (200, 429, 503)
        return not empty()

    try:
        wait_until(all_have_data, "data in all panels", patience_s=30)
    except AssertionError:
        assert empty() == []
    for combination in itertools.product(*choices.values()):
        for _, expression in panels(name):
            watched.prometheus.query(expanded(expression, dict(zip(choices, combination, strict=True))))


def test_every_rule_has_data(watched: Watched) -> None:
    """Each recording rule records something, and each alert's expression is valid."""
    names = {rule["record"] for file in ("settings.yml", "rules.yml") for rule in rules(file)}

    def all_have_data() -> bool:
        assert watched.system.rest("/v2/models/slow/infer", ROW)[0] in (200, 429, 503)
        return all(watched.prometheus.query(record) for record in names)

    wait_until(all_have_data, f"data of {sorted(names)}")
    groups = watched.prometheus.get("/api/v1/rules")["groups"]
    assert {rule["health"] for group in groups for rule in group["rules"]} == {"ok"}
