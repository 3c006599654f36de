"""What tests share, and which of them run where.

Every test gets one of two marks here: ``heavy`` if it starts processes or trains models, ``unit`` otherwise; one that a target of
its own runs (see "run by" in pyproject.toml) gets neither. ``make check`` runs ``unit``, ``make test`` and ``pytest`` alone both.
"""

from __future__ import annotations

import atexit
import gc
import importlib.util
import os
import sys
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # before numpy: each worker would take all cores for BLAS
    os.environ.setdefault(_name, "1")

import pytest
from hypothesis import settings
from structlog.dev import ConsoleRenderer, plain_traceback

from tests.budgets import IS_CI
from tests.folders import MadeOnce, made_once_in

if TYPE_CHECKING:
    from tests.demo_models import Demos

# A busy machine is no bug, so there is no deadline.
settings.register_profile("full", deadline=None, max_examples=100)
settings.register_profile("quick", deadline=None, max_examples=20)
settings.load_profile("full" if IS_CI else "quick")

if hasattr(ConsoleRenderer, "get_active"):  # from structlog 25.5 on
    ConsoleRenderer.get_active().exception_formatter = plain_traceback  # rich takes a tenth of a second for each

if importlib.util.find_spec("sniffio") is None:
    sys.modules["sniffio"] = None  # type: ignore[assignment]  # httpcore looks for it in all of the path at every request


HEAVY_FOLDERS = ("checks", "preprocess", "publishing", "system")
"""Folders whose tests start processes, or train and publish models."""

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker's last act: taking all its modules and tests apart would cost it seconds
    atexit.register(os._exit, 0)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """What `make check` does not run it does not import, nor `make heavy`."""
    if config.option.markexpr == "unit" and collection_path.name in HEAVY_FOLDERS:
        return True
    if config.option.markexpr == "heavy" and collection_path.name.startswith("test_") and not _may_be_heavy(collection_path):
        return True
    return None


def _may_be_heavy(module: Path) -> bool:
    """Whether there are heavy tests in a module: by its folder, or since it has the mark or names the fixture."""
    return module.parent.name in HEAVY_FOLDERS or any(word in module.read_text() for word in ("heavy", "demos"))


@pytest.hookimpl(tryfirst=True)  # before tests are selected by mark, and before xdist reads their groups
def pytest_collection_modifyitems(config: pytest.Config, items: Iterable[pytest.Function]) -> None:
    apart = {line.partition(":")[0] for line in config.getini("markers") if "run by `make" in line}
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        # The lines of docs/conformance.md that it is about go into its record.
        item.user_properties += [("line", line) for mark in item.iter_markers("line") for line in mark.args]
        is_heavy = item.path.parent.name in HEAVY_FOLDERS or "heavy" in marks or "demos" in item.fixturenames
        if is_heavy and not _may_be_heavy(item.path):
            raise pytest.UsageError(f"{item.nodeid} is heavy, and `make heavy` does not find it: name the fixture demos in it")
        if marks.isdisjoint(apart):
            item.add_marker("heavy" if is_heavy else "unit")
        if is_heavy and "xdist_group" not in marks and (group := system_of(item) or module_of(item)):
            item.add_marker(pytest.mark.xdist_group(group))


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """Objects made here are kept, so the garbage collector skips them. What `make check` runs does not publish."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
        if session.config.option.markexpr == "unit" and (as_served := sys.modules.get("splitserve.publishing.as_served")):
            as_served.check = _refuse_to_publish  # type: ignore[attr-defined]


def _refuse_to_publish(*_: object, **__: object) -> None:
    raise AssertionError("a unit test publishes, which starts a process: mark it heavy")


def system_of(item: pytest.Function) -> str:
    """The running system that a test shares with others: one worker gets them all, so that it is started once. "" if none."""
    if "system" not in item.fixturenames:
        return ""
    owner = item.path.stem if hasattr(item.module, "system") else item.path.parent.name
    variant = item.callspec.params.get("system", "") if hasattr(item, "callspec") else ""
    return f"{owner}-{variant}"


def module_of(item: pytest.Function) -> str:
    """The module whose tests share a fixture with this one, e.g. published models, for the same reason. "" if there is none."""
    definitions = (each[-1] for each in item._fixtureinfo.name2fixturedefs.values() if each)
    is_shared = any(each.scope == "module" and each.baseid == item.nodeid.partition("::")[0] for each in definitions)
    return item.path.stem if is_shared else ""


@pytest.fixture(scope="session")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Demos:
    """The demo models, trained and published once a run. All workers share them: a test that publishes takes a copy."""
    from tests.demo_models import publish_demos_once  # here: the process that hands tests out to workers needs no scikit-learn

    folder = tmp_path_factory.getbasetemp()
    return publish_demos_once((folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "demos")


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """The folder that a function has filled, e.g. by publishing: once in each process. A test that changes it takes a copy."""
    return made_once_in(lambda: tmp_path_factory.mktemp("made-once"))


@pytest.fixture(params=["own", "grpcio"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What `splitserve.testing.serving` and the services speak gRPC with in a test: each of the two, one after the other."""
    monkeypatch.setattr("splitserve.testing.ENGINE", request.param)
    monkeypatch.setenv("GRPC_ENGINE", request.param)
    return str(request.param)
