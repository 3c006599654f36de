"""The rules for Prometheus, by promtool: what raises each alert, and what raises none."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from splitserve.telemetry.families import FAMILIES
from tests.alerting.rule_files import LONGEST_SCRAPE_INTERVAL_S, PROMETHEUS, ROOT, read, rules, windows

pytestmark = pytest.mark.alerting

ALERTS = [rule["alert"] for rule in rules("alerts.yml")]
CASES = read("alerts_test.yml")["tests"]
SILENT = ("no traffic", "traffic", "one request an hour fails, and no other is sent", "counters are reset")
RULE_FILES = ("settings.yml", "rules.yml", "alerts.yml")


def promtool(*arguments: str | Path) -> str:
    """What it prints; fails with that if it fails."""
    answer = subprocess.run(["promtool", *arguments], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


def test_the_configuration_is_valid() -> None:
    """With all rule files that it names, and without a rule that is there twice."""
    printed = promtool("check", "config", PROMETHEUS / "prometheus.yml")

    assert all(f"{name}\n  SUCCESS" in printed for name in RULE_FILES), printed
    promtool("check", "rules", "--lint=all", "--lint-fatal", *(PROMETHEUS / name for name in RULE_FILES))


def test_alerts_are_raised_and_end_when_they_should() -> None:
    """alerts_test.yml as it is: series once a minute, the longest interval of scrapes that the rules bear."""
    promtool("test", "rules", PROMETHEUS / "alerts_test.yml")


def test_alerts_are_the_same_with_scrapes_every_15_s(tmp_path: Path) -> None:
    """Windows are long enough for scrapes once a minute, and do not depend on there being few."""
    content = read("alerts_test.yml")
    content["rule_files"] = [str(PROMETHEUS / name) for name in content["rule_files"]]
    content["tests"] = [
        with_interval_15s(case) for case in content["tests"] if case["name"].startswith("Splitserve") and not is_long(case)
    ]
    (tmp_path / "alerts_test.yml").write_text(yaml.safe_dump(content))

    promtool("test", "rules", tmp_path / "alerts_test.yml")


def is_long(case: dict[str, Any]) -> bool:
    return any("h" in test["eval_time"] for test in case["promql_expr_test"])


def with_interval_15s(case: dict[str, Any]) -> dict[str, Any]:
    """The same values at the same times, with three more between each two."""
    series = [{**each, "values": between(each["values"])} for each in case["input_series"]]
    return {**case, "interval": "15s", "input_series": series}


def between(values: str) -> str:
    """`1+4x2` becomes `1+1x8`: promtool's notation, a first value and N more."""

    def four_times(found: re.Match[str]) -> str:
        step = f"+{float(found['step']) / 4:g}" if found["step"] else ""
        return f"{found['first']}{step}x{4 * int(found['n']) + (0 if step else 3)}"

    return re.sub(r"(?P<first>[\d.]+|_)(?:\+(?P<step>[\d.]+))?x(?P<n>\d+)", four_times, values)


def test_without_settings_an_alert_says_so(tmp_path: Path) -> None:
    """Nothing else could be raised then."""
    labels = 'ALERTS{alertname="SplitserveSettingsMissing", alertstate="firing", severity="critical"}'
    expression = 'ALERTS{alertstate="firing", alertname="SplitserveSettingsMissing"}'
    tests = [{"expr": expression, "eval_time": "10m", "exp_samples": [{"labels": labels, "value": 1}]}]
    content = {"rule_files": [str(PROMETHEUS / "alerts.yml")], "tests": [{"input_series": [], "promql_expr_test": tests}]}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(content))

    promtool("test", "rules", tmp_path / "test.yml")


@pytest.mark.parametrize("name", [name for name in ALERTS if name != "SplitserveSettingsMissing"])
def test_each_alert_has_a_case_that_raises_it_and_one_after_it(name: str) -> None:
    """And none of the cases without a fault expects it."""
    own = [case for case in CASES if case["name"].startswith(name)]

    expected = [test for case in own for test in case["promql_expr_test"]]
    assert any(test["exp_samples"] for test in expected)
    assert any(not test["exp_samples"] for test in expected)
    assert {test["exp_samples"] == [] for case in CASES if case["name"] in SILENT for test in case["promql_expr_test"]} == {True}


def test_every_window_holds_four_of_the_longest_intervals() -> None:
    """Fewer would leave gaps where one scrape is late."""
    expressions = [rule["expr"] for name in ("rules.yml", "alerts.yml") for rule in rules(name)]

    assert min(window for expression in expressions for window in windows(expression)) >= 4 * LONGEST_SCRAPE_INTERVAL_S


def test_rules_name_only_metrics_that_exist() -> None:
    """Those of docs/metrics.md, and those that the rules record."""
    recorded = {rule["record"] for name in ("settings.yml", "rules.yml") for rule in rules(name)}
    known = {family.name for family in FAMILIES}
    for name in ("rules.yml", "alerts.yml"):
        for rule in rules(name):
            for metric in re.findall(r"\b(?:splitserve[:_][a-z0-9_:]+|process_[a-z_]+)", rule["expr"]):
                assert metric in recorded or metric in known or re.sub("_(bucket|sum|count)$", "", metric) in known, metric


def test_each_alert_is_explained() -> None:
    """By a section of docs/alerts.md, which its annotation `runbook` names."""
    page = (ROOT / "docs/alerts.md").read_text()

    for rule in rules("alerts.yml"):
        assert f"### {rule['alert']}\n" in page
        assert rule["annotations"]["runbook"] == f"docs/alerts.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in {"critical", "warning"}
