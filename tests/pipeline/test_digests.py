"""When two things have the same digest."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splitserve.pipeline.context import Call, Checkpoints, Context, StepFailed, error_message
from splitserve.pipeline.declaration import DeclarationError, Step, TrainingPipeline
from splitserve.pipeline.dependencies import changes, locked_versions
from splitserve.pipeline.digests import NotPlainData, canonical, digest_of
from splitserve.pipeline.environment import differences
from splitserve.pipeline.registry import beats
from splitserve.pipeline.sources import SourceError, Sources


def test_one_as_integer_float_boolean_and_text_are_different():
    """A step that got 1 may answer otherwise for 1.0, true or "1"."""
    assert len({digest_of(value) for value in (1, 1.0, True, "1", None, [1], {"1": 1})}) == 7


def test_equal_values_are_the_same_however_they_are_written():
    assert canonical({"b": 0.1, "a": [1e-1]}) == canonical({"a": [0.1], "b": 1e-1}) == '{"a":[0.1],"b":0.1}'


@pytest.mark.parametrize(
    "value",
    [np.float64(1), np.int64(1), (1,), {1}, {1: 2}, lambda: 1, object(), float("nan"), float("inf"), b"1", Path("x")],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not_plain_data_is_refused(value: Any):
    """A value whose digest could change by itself, or that would read back as another, is no parameter; nested neither."""
    for nested in (value, [value], {"a": value}):
        with pytest.raises(NotPlainData, match="expected"):
            canonical(nested)
    with pytest.raises(DeclarationError, match='parameter "rate"'):
        TrainingPipeline("p", "p", Path(), [], {"rate": value})


def test_digests_do_not_depend_on_the_hash_seed():
    program = "from splitserve.pipeline.digests import digest_of; print(digest_of({k: 1 for k in {'a', 'b', 'c', 'd'}}))"
    found = {
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(found) == 1


def test_changes_name_what_differs():
    old = {"parameters": {"a": 1, "b": 1}, "lock": None, "sources": {"m": "1"}}
    new = {"parameters": {"a": 1.0, "b": 1}, "lock": [], "sources": {"n": "1"}}
    assert changes(old, new) == ["parameters a", "lock", "sources n", "sources m"]


def test_a_lock_is_its_versions_and_not_its_hashes(tmp_path: Path):
    lock = tmp_path / "lock.txt"
    lock.write_text("# made by a tool\nb==2 \\\n    --hash=sha256:1 \\\n    --hash=sha256:2\na==1 ; python_version < '4'\n")
    assert locked_versions(lock) == ["a==1 ; python_version < '4'", "b==2"]
    with pytest.raises(DeclarationError, match=r"none\.txt"):
        locked_versions(tmp_path / "none.txt")


def test_an_environment_that_is_not_the_locks_is_reported():
    """Missing packages and other versions; what is for other environments does not count."""
    version = np.__version__
    lock = [f"numpy=={version}", "numpy==1.0", "no-such-package==1", "no-such-package==1 ; python_version < '3'"]
    assert differences(lock) == [f"numpy {version} instead of ==1.0", "no no-such-package"]


def write_modules(folder: Path, **modules: str) -> Sources:
    for name, text in modules.items():
        path = folder.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        for parent in path.relative_to(folder).parents[:-1]:
            (folder / parent / "__init__.py").touch()
    return Sources([str(folder), *sys.path], folder / "cache.json")


def test_modules_are_found_through_other_modules(tmp_path: Path):
    """Directly, through a helper's helper, relative, in a function, as a submodule; not for type checkers only."""
    sources = write_modules(
        tmp_path,
        p__step="import json\nimport numpy\nfrom . import helper\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import p.types\n",
        p__helper="def f():\n    from .sub.deep import x\n",
        p__sub__deep="from ..beside import *\nfrom p.sub import other\n",
        p__sub__other="",
        p__beside="",
        p__types="",
        p__unrelated="",
    )
    assert list(sources.reached(["p.step"])) == [
        "p", "p.beside", "p.helper", "p.step", "p.sub", "p.sub.deep", "p.sub.other",
    ]  # fmt: skip


def test_comments_do_not_change_a_source_and_code_does(tmp_path: Path):
    digests = [write_modules(tmp_path, m=text).reached(["m"])["m"] for text in ("x = 1\n", "# why\nx  =  1  # here\n", "x = 2\n")]
    assert digests[0] == digests[1] != digests[2]


def test_a_broken_cache_is_ignored_and_a_broken_module_is_an_error(tmp_path: Path):
    (tmp_path / "cache.json").write_text("{")
    assert write_modules(tmp_path, m="x = 1").reached(["m"])
    with pytest.raises(SourceError, match=r"m\.py"):
        write_modules(tmp_path, m="x = ").reached(["m"])


def test_declarations_that_cannot_run_are_refused():
    """Twice the same name, an input that is no earlier step, a parameter that nobody declares."""
    first = Step("first", ".m:f")
    for steps, complaint in (
        ([first, first], "twice"),
        ([Step("second", ".m:f", inputs=("first/x",)), first], "not an earlier step"),
        ([Step("first", ".m:f", parameters=("rate",))], '"rate"'),
    ):
        with pytest.raises(DeclarationError, match=complaint):
            TrainingPipeline("p", "p", Path(), steps)
    with pytest.raises(DeclarationError, match='"seeed" does not exist; there are: seed'):
        TrainingPipeline("p", "p", Path(), [first], {"seed": 1}).with_parameters({"seeed": 2})


def test_the_last_two_checkpoints_are_kept_and_a_damaged_one_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    checkpoints = Checkpoints(tmp_path)
    for number in (1, 2, 10):
        checkpoints.save(number, b"%d" % number)
    assert len(list(tmp_path.iterdir())) == 2
    assert checkpoints.newest() == (10, b"10")

    newest = max(tmp_path.iterdir())
    newest.write_bytes(b"1")
    assert checkpoints.newest() == (2, b"2")
    assert "damaged" in capsys.readouterr().out


def test_a_metric_that_is_not_finite_fails_the_step(tmp_path: Path):
    folder = str(tmp_path)
    context = Context(
        Call("train", "m", "f", parameters={}, files={}, locked=[], inputs=folder, outputs=folder, scratch=folder, error="")
    )
    context.metric("loss", 0.5, at=1)
    for value in (float("nan"), float("inf")):
        with pytest.raises(StepFailed, match='metric "loss" at 2: expected a finite number'):
            context.metric("loss", value, at=2)


@pytest.mark.parametrize(
    ("champion", "value", "is_moved"),
    [
        (None, 0.1, True),
        (("1", {"splitserve.metric.accuracy": "0.9"}), 0.9, True),
        (("1", {"splitserve.metric.accuracy": "0.9"}), 0.89, True),
        (("1", {"splitserve.metric.accuracy": "0.9"}), 0.88, False),
        (("1", {"splitserve.metric.accuracy": "nan"}), 0.5, True),
        (("1", {}), 1.0, False),
    ],
)
def test_a_champion_is_replaced_by_what_is_as_good_within_the_margin(champion: Any, value: float, is_moved: bool):
    """A champion whose metric is unknown is moved by hand only."""
    assert beats(champion, "accuracy", value, 0.01)[0] is is_moved


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_a_file_that_cannot_be_written_is_reported_with_the_way_out(number: int):
    """With its name; other errors are reported as they are."""
    message = error_message(OSError(number, os.strerror(number), "/store/mlflow.db"))

    assert message == (
        f"/store/mlflow.db: {os.strerror(number)}; what has finished is kept, and the same command continues once it can be "
        "written"
    )
    assert error_message(FileNotFoundError(errno.ENOENT, "no such file", "x")) == "[Errno 2] no such file: 'x'"
