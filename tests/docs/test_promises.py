"""What docs/attacks.md, docs/reliability.md, docs/telemetry.md and docs/training.md say is kept by tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"tests/[\w/]+\.py::\w+")
ROW = re.compile(r"^\| ([A-HMR]\d\d|P-\d\d) \|(.*)\|$", re.MULTILINE)
_ATTACKS = """
A01 A02 A03 A04 A05 A07 A08 A09 A10 A11 A13 A14 A15 A16 A17 A18 B01 B02 B03 B04 B05 B07 B08 B09 C01 C02 C03 C04 C05 C08 C09 C10
C11 D01 D02 D03 D04 D05 D06 D07 D08 D09 D10 D11 D13 D15 E01 E02 E03 E04 E05 E06 E07 E08 E09 E10 F01 F02 F03 F04 F06 F07 F08 F09
G01 G02 G03 G05 G06 G07 G08 G09 G11 H01 H03 H04 H06
"""
ATTACKS = _ATTACKS.split()
_TRAINING = """
R01 R03 R04 R05 R06 R08 R11 R12 R14 R15 R16 R18 R19 R20 R22 R23 R24 R25 R26 R27 R29 R30 R31 R33 R34 R35 R37 R38 R40 R41 R42 R43
"""
_TELEMETRY = "M01 M03 M04 M05 M07 M09 M10 M11 M12 M15 M16 M17 M18 M19 M20 M21 M22 M23 M24 M26 M27"
PAGES = {
    "attacks.md": ATTACKS,
    "reliability.md": [f"P-{number:02}" for number in range(1, 47)],
    "training.md": _TRAINING.split(),
    "telemetry.md": _TELEMETRY.split(),
}


def rows(page: str) -> dict[str, str]:
    return dict(ROW.findall((ROOT / "docs" / page).read_text()))


@pytest.mark.parametrize("page", PAGES)
def test_no_row_is_missing(page: str) -> None:
    """Each attack and each promise has its row, in order."""
    assert list(rows(page)) == PAGES[page]


@pytest.mark.parametrize("page", PAGES)
def test_every_row_names_a_test_or_gives_a_reason(page: str) -> None:
    """What is kept by no test yet says so."""
    unkept = [
        row
        for row, text in rows(page).items()
        if not LINK.search(text) and not re.search("container test|not yet|not tested: ", text, re.IGNORECASE)
    ]

    assert unkept == []


@pytest.mark.parametrize("page", [*PAGES, "security.md"])
def test_every_named_test_exists(page: str) -> None:
    """By file and name."""
    links = LINK.findall((ROOT / "docs" / page).read_text())

    missing = [link for link in dict.fromkeys(links) if not is_there(*link.split("::"))]

    assert missing == []


def is_there(path: str, name: str) -> bool:
    file = ROOT / path
    return file.exists() and re.search(rf"^(?:async )?def {name}\(", file.read_text(), re.MULTILINE) is not None
