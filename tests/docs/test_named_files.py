"""Files, modules and functions that the documents name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "benchmarks/README.md", "protos/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
FILE = re.compile(r"`((?:splitserve|[a-z]+_service|proxy|protos|tests|docs|deploy|examples|training|benchmarks)/[\w./-]*)`")

ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()
CODE = ("splitserve", "proxy", "preprocess_service", "predict_service", "jobs_service", "fused_service")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_named_file_exists(page: Path) -> None:
    """A path in backticks, from the root of the repository."""
    missing = [name for name in FILE.findall(page.read_text()) if not (ROOT / name).exists()]

    assert missing == []


def test_the_code_map_names_modules_that_exist() -> None:
    """Each word in backticks of a row is a module or folder of the row's packages, or a path."""
    table = ARCHITECTURE.split("## Code map")[1].split("\n## ")[0]
    missing = []
    for row in re.findall(r"^\| (`.*?) \| (.*) \|$", table, flags=re.MULTILINE):
        packages = [ROOT / name.removesuffix("*.py") for name in re.findall(r"`([\w/.*]+)`", row[0])]
        for name in re.findall(r"`([a-z_0-9]+/?)`", row[1]):
            places = [package / file for package in (ROOT, *packages) for file in (f"{name}.py", name)]
            missing += [] if any(place.exists() for place in places) else [f"{row[0]}: {name}"]

    assert missing == []


def test_the_architecture_names_what_its_files_define() -> None:
    """Where it says `NAME` in `FILE`, and for the files that it names without their folders."""
    sources = {path.name: path for folder in CODE for path in (ROOT / folder).rglob("*.py")}
    bare = re.findall(r"`(\w+\.py)`", ARCHITECTURE)
    defined = re.findall(r"`(\w+)`\s+in\s+`([\w/]+\.py)`", ARCHITECTURE)

    assert [name for name in bare if name not in sources] == []
    assert len(defined) > 5
    assert [
        name for name, file in defined if not re.search(rf"^\s*(async def|def|class) {name}\b", (ROOT / file).read_text(), re.M)
    ] == []


def test_the_architecture_names_methods_that_exist() -> None:
    """Where it says `CLASS.METHOD`."""
    sources = [path.read_text() for folder in CODE for path in (ROOT / folder).rglob("*.py")]
    named = re.findall(r"`([A-Z]\w+)\.(\w+)`", ARCHITECTURE)

    assert len(named) > 5
    assert [f"{owner}.{name}" for owner, name in named if not any(_has(source, owner, name) for source in sources)] == []


def _has(source: str, owner: str, name: str) -> bool:
    """Whether a module has a class with a method or field of that name, as far as the next definition at its level."""
    found = re.search(rf"^class {owner}\b.*?(?=^\S|\Z)", source, re.M | re.S)
    return found is not None and re.search(rf"^    (async def|def) {name}\b|^    {name}:", found.group(), re.M) is not None
