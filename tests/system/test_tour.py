"""The tour of versions, run as a user runs it, and the guide, which quotes what it prints."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.xdist_group("tour"), pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
TOUR = ROOT / "examples" / "versions" / "tour.py"
GUIDE = ROOT / "docs" / "guide-versions.md"


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the tour prints, to its end."""
    repository = tmp_path_factory.mktemp("tour") / "models"
    answer = subprocess.run([sys.executable, TOUR, "--repository", repository], capture_output=True, text=True)
    assert answer.returncode == 0, f"{answer.stdout}\n{answer.stderr}"
    return answer.stdout


def plain(line: str) -> str:
    """A line without what differs from run to run: numbers, digests, folders, the width of columns."""
    line = re.sub(r"\b[0-9a-f]{64}\b", "DIGEST", line)
    line = re.sub(r"(\S*/)?(models|tour)(-proposal)?(?=[ /]|$)", "FOLDER", line)
    return " ".join(re.sub(r"\d+(\.\d+)*(e-\d+)?", "N", line).split())


def test_the_tour_runs_to_its_end(printed: str) -> None:
    """Refused, live, damaged: in this order, and no request fails."""
    story = [
        r"rents  1        1\.1   by default  served",
        r"rents  1\.1   1        \d+ +agrees",
        r'features that differ from those trained on: 2\s+"district_',
        r"2 features differ from those that the predictor was trained on",
        r'rents  2\.1 +refused \(1\)\s+\(1\) the halves do not fit: feature 0: expected "district_south", .*',
        r"requests so far: \d+ by 1\.1, 0 failed",
        r"not deployable: rents 2\.1, named by its route, has no release",
        r"rents  2        3\.2   by default  served",
        r"requests so far: .*\d+ by 3\.2, 0 failed",
        r"rents  3\.2   2        \d+ +agrees",
        r"rolled rents back from release 2 to 1\.1, as release 3",
        r"released rents 3\.2 as release 4",
        r"4 +3\.2 .* current",
        r"rents/predict/2: model\.onnx: expected sha256",
        r"requests so far: .*\d+ by 3\.2, 0 failed",
        r"3\.2 +4 +UNAVAILABLE",
        r"1\.1 serves",
    ]

    assert re.search(".*".join(story), printed, flags=re.DOTALL), printed


def test_the_guide_quotes_what_the_tour_prints(printed: str) -> None:
    """Every line of its blocks of text, but for numbers and folders."""
    blocks = re.findall(r"^```text\n(.*?)^```$", GUIDE.read_text(), flags=re.MULTILINE | re.DOTALL)
    found = {plain(line) for line in printed.splitlines()}

    quoted = [plain(line) for block in blocks for line in block.splitlines() if line.strip()]

    assert quoted
    assert [line for line in quoted if line not in found] == []
