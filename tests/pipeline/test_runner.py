"""Which steps run, what is reused, and what is left when something fails. MLflow is real, its store a folder."""

from __future__ import annotations

import contextlib
import html
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from splitserve.pipeline.commands import main
from splitserve.pipeline.context import RecordError
from splitserve.pipeline.declaration import DeclarationError
from splitserve.pipeline.index import Index, RunState, now
from splitserve.pipeline.runner import RunFailed, Runner
from tests.folders import MadeOnce
from tests.pipeline import tiny
from tests.pipeline.tiny import ran, run

pytestmark = [
    pytest.mark.training,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.xdist_group("pipeline"),
]


def _finished(folder: Path) -> None:
    run(tiny.write(folder))


@pytest.fixture
def package(made_once: MadeOnce, tmp_path: Path) -> Path:
    """The package of a pipeline that has run once: a copy, in which the absolute paths of artifacts are changed."""
    source = made_once(_finished)
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    for file in (tmp_path / "store" / "index").rglob("*.json"):
        file.write_text(file.read_text().replace(str(source), str(tmp_path)))
    with contextlib.closing(sqlite3.connect(tmp_path / "store" / "mlflow.db")) as database, database:
        for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
            database.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (str(source), str(tmp_path)))
    return tmp_path / "tiny"


def mlflow_runs(package: Path) -> dict[str, list[str]]:
    """Statuses of the runs in MLflow by name, newest first."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{package.parent / 'store' / 'mlflow.db'}")
    found: dict[str, list[str]] = {}
    for each in client.search_runs([client.get_experiment_by_name("tiny").experiment_id]):
        found.setdefault(each.info.run_name, []).append(each.info.status)
    return found


def test_a_run_with_nothing_to_do_runs_nothing_and_imports_no_mlflow(package: Path):
    for command in ("run", "status"):
        program = (
            f"import sys; from tests.pipeline.tiny import pipeline; from splitserve.pipeline.commands import main; "
            f"from pathlib import Path; code = main(pipeline(Path({str(package)!r})), [{command!r}]); "
            f"print('mlflow' in sys.modules, code)"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert done.stdout.endswith("False 0\n"), done.stdout


def _append(name: str, text: str = "x = 1\n"):
    def change(package: Path) -> None:
        with (package / name).open("a") as file:
            file.write(text)

    return change


def _touch(package: Path) -> None:
    for file in package.iterdir():
        os.utime(file, (1, 1))


def _same_size_and_time(package: Path) -> None:
    file = package / "words.txt"
    facts = file.stat()
    file.write_bytes(file.read_bytes().replace(b"two", b"tow"))
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "rerun"),
    [
        (_touch, []),
        (_same_size_and_time, ["data", "train"]),  # as many words: train's output is the same
        (_append("words.txt", "four\n"), ["data", "train", "evaluate"]),
        (_append("words.txt", "\n"), ["data"]),  # its output is the same
        (_append("data.py"), ["data"]),
        (_append("train.py"), ["train"]),
        (_append("deeper.py", "SUFFIX = '?'\n"), ["train", "evaluate"]),  # a helper of a helper
        (_append("deeper.py", "# a comment\n"), []),
        (_append("evaluate.py"), ["evaluate"]),
        (_append("lock.txt", "scipy==1.0\n"), ["train"]),
        (_append("lock.txt", "    --hash=sha256:11\n"), []),
        (lambda package: os.utime(package / "words.txt", (1, 1)), []),
    ],
    ids=[
        "touched",
        "same size and time",
        "data",
        "data without effect",
        "step",
        "later step",
        "helper",
        "comment",
        "last step",
        "lock",
        "hash",
        "touched",
    ],
)
def test_a_change_reruns_what_is_downstream(package: Path, change, rerun: list[str]):
    """Exactly: a step whose inputs have the same bytes as before is reused."""
    change(package)
    assert ran(run(package)) == rerun
    assert run(package) is None


def test_parameters_rerun_the_steps_that_read_them(package: Path, monkeypatch: pytest.MonkeyPatch):
    assert ran(run(package, rate=0.2)) == ["train", "evaluate"]
    assert run(package, rate=0.1) is None, "the earlier result is still there"
    assert run(package, unused=2) is None
    assert ran(run(package, floor=2)) == ["evaluate"]
    assert ran(run(package, floor=2.0)) == ["evaluate"]
    monkeypatch.setenv("TINY_SWITCH", "1")
    assert ran(run(package)) == ["train"]


def test_from_and_until_choose_steps(package: Path):
    assert ran(run(package, first="train")) == ["train", "evaluate"]
    assert ran(run(package, until="train", rate=0.3)) == ["train"]
    with pytest.raises(DeclarationError, match='"tarin" does not exist; there are: data, train, evaluate'):
        run(package, first="tarin")


def test_an_output_that_is_gone_or_changed_makes_its_step_run_again(package: Path):
    """The step says why; what is downstream is reused, since the output comes back with the same bytes."""
    index = Index(package.parent / "store", "tiny")
    model = Path(index.last("train").folder) / "model.txt"
    model.unlink()
    state = run(package)
    assert ran(state) == ["train"]
    assert "model.txt is missing" in state.steps[1].why

    model = Path(index.last("train").folder) / "model.txt"
    model.write_text(model.read_text().replace("1", "2", 1))
    state = run(package)
    assert "model.txt" in state.steps[1].why
    assert ran(state) == ["train"]


def test_a_step_that_writes_into_its_input_changes_a_copy(package: Path):
    """`evaluate` of this pipeline does; the store has what train wrote."""
    assert Index(package.parent / "store", "tiny").last("train").problem() == ""


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"loss": 1e999}, 'parameter "loss"'),
        ({"words": "none.txt"}, "none.txt, which is not a file"),
    ],
)
def test_invalid_parameters_start_no_run(package: Path, changed, message: str):
    before = mlflow_runs(package)
    with pytest.raises(DeclarationError, match=message):
        run(package, **changed)
    assert mlflow_runs(package) == before


def test_a_failing_step_ends_the_run(package: Path):
    """It is marked as failed, with the reason; nothing after it runs; the next run tries it again."""
    with pytest.raises(RunFailed, match="step train failed: TypeError"):
        run(package, rate=None)
    with pytest.raises(RunFailed, match='step train failed: metric "loss" at 1: expected a finite number, got nan'):
        run(package, loss="nan")
    with pytest.raises(RunFailed, match="step evaluate failed: fewer epochs than the floor"):
        run(package, floor=9)
    found = mlflow_runs(package)
    assert (found["tiny"][:3], found["train"][1:3], found["evaluate"][0]) == (["FAILED"] * 3, ["FAILED"] * 2, "FAILED")
    assert len(found["evaluate"]) == 2, "not after a failed train"
    assert ran(run(package, floor=2)) == ["evaluate"]


@pytest.fixture
def no_run_can_be_ended() -> Iterator[pytest.MonkeyPatch]:
    """MLflow ends the runs of steps, and is away when the run itself ends; until the changes are undone."""
    from mlflow.tracking import MlflowClient

    terminate = MlflowClient.set_terminated

    def away(client: Any, run_id: str, *values: Any) -> None:
        if "splitserve.step" not in client.get_run(run_id).data.tags:
            raise ConnectionError("connection refused")
        terminate(client, run_id, *values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MlflowClient, "set_terminated", away)
        yield patch


def test_an_end_that_was_not_recorded_is_recorded_by_the_next_run(package: Path, no_run_can_be_ended: pytest.MonkeyPatch):
    """All steps have finished; the next run has nothing else to do."""
    _append("evaluate.py")(package)
    with pytest.raises(RecordError, match="set_terminated: connection refused"):
        run(package)
    (*_, last) = Index(package.parent / "store", "tiny").runs()
    assert (last.state, last.is_recorded) == ("finished", False)
    assert mlflow_runs(package)["tiny"][0] == "RUNNING"

    no_run_can_be_ended.undo()
    assert run(package) is None
    assert mlflow_runs(package)["tiny"][0] == "FINISHED"
    assert (package.parent / "store" / "reports" / f"{last.id}.html").exists()
    assert not Index(package.parent / "store", "tiny").open_runs()


def test_a_failure_that_was_not_recorded_is_recorded_as_one(
    package: Path, no_run_can_be_ended: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Not as an interrupted run; `status` works while MLflow is away."""
    with pytest.raises(RunFailed, match="fewer epochs than the floor"):
        run(package, floor=9)
    assert main(tiny.pipeline(package), ["status"]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[-1].endswith("failed: data reused, train reused, evaluate failed")
    assert "connection refused; the next command records how earlier runs have ended" in said.err

    no_run_can_be_ended.undo()
    assert main(tiny.pipeline(package), ["status"]) == 0
    assert capsys.readouterr().err == ""
    found = mlflow_runs(package)
    assert (found["tiny"][0], found["evaluate"][0]) == ("FAILED", "FAILED")


def test_mlflow_that_goes_away_between_two_steps_fails_the_run(package: Path, monkeypatch: pytest.MonkeyPatch):
    """What has finished is kept."""
    from splitserve.pipeline.record import Record

    start_step = Record.start_step

    def away(record: Record, step: str, *values: Any, **named: Any) -> str:
        if step == "evaluate":
            raise RecordError("MLflow: connection refused")
        return start_step(record, step, *values, **named)

    monkeypatch.setattr(Record, "start_step", away)
    with pytest.raises(RecordError, match="connection refused"):
        run(package, rate=0.2)
    (*_, last) = Index(package.parent / "store", "tiny").runs()
    assert (last.state, last.why) == ("failed", "MLflow: connection refused")
    assert [step.state for step in last.steps] == ["reused", "finished", "failed"]
    assert mlflow_runs(package)["tiny"][0] == "FAILED"

    monkeypatch.undo()
    assert ran(run(package, rate=0.2)) == ["evaluate"]


def test_a_run_that_was_killed_before_it_wrote_anything_down_is_closed_by_the_next(package: Path):
    """In MLflow it is RUNNING then; what others have started in the same experiment is not touched."""
    from splitserve.pipeline.record import Record

    record = Record(package.parent / "store", "tiny")
    killed = record.start("killed", {})
    others = record.client.create_run(record.client.get_run(killed).info.experiment_id, run_name="others").info.run_id
    _append("evaluate.py")(package)

    assert ran(run(package)) == ["evaluate"]

    assert (mlflow_runs(package)["killed"], mlflow_runs(package)["others"]) == (["KILLED"], ["RUNNING"])
    record.client.set_terminated(others)


def test_runs_are_ordered_by_their_start_within_a_second_too(tmp_path: Path):
    index = Index(tmp_path, "tiny")
    for name, started_at in (("b", now()), ("c", "9999-01-01T00:00:00.002Z"), ("a", "9999-01-01T00:00:00.001Z")):
        index.write_run(RunState(name, "tiny", "finished", 1, "host", started_at, {}))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", now())
    assert [run.id for run in index.runs()] == ["b", "a", "c"]


def start(package: Path, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    paths = os.pathsep.join([str(package.parent), str(Path(__file__).parents[2])])
    command = [sys.executable, "-m", "tiny", "run", *arguments]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}, **options)


def wait_for(claim, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not claim():
        assert process.poll() is None, "it ended before"
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_a_step_cleans_up_when_its_run_is_interrupted(tmp_path: Path):
    """What it has started, e.g. containers, is stopped before its process is killed."""
    package = tiny.write(tmp_path)
    (package / "train.py").write_text("""
import time
from pathlib import Path
def train(context):
    folder = Path(__file__).parent
    try:
        (folder / "begun").touch()
        while True:
            time.sleep(0.01)
    finally:
        (folder / "cleaned").touch()
""")
    process = start(package)
    wait_for((package / "begun").exists, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 130
    assert (package / "cleaned").exists()
    assert [run.state for run in Index(tmp_path / "store", "tiny").runs()] == ["interrupted"]


def test_what_a_killed_step_has_started_is_ended(package: Path):
    """The step's process alone is killed here; the runner says by which signal."""
    (package / "train.py").write_text("""
import os, signal, subprocess
from pathlib import Path
def train(context):
    child = subprocess.Popen(["sleep", "600"])
    Path(__file__).with_name("child").write_text(str(child.pid))
    os.kill(os.getpid(), signal.SIGKILL)
""")
    with pytest.raises(RunFailed, match="step train failed: its process was killed by signal 9; its output is above"):
        run(package)
    status = Path("/proc", (package / "child").read_text(), "status")
    deadline = time.monotonic() + 60
    while status.exists() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < deadline, "it is still running"


def test_training_that_is_killed_goes_on_from_its_last_checkpoint(package: Path):
    """With the result of an uninterrupted run, one value of each metric and epoch, and the dead run closed in MLflow."""
    index = Index(package.parent / "store", "tiny")
    whole = index.last("train")
    (package / "words.txt").write_text("one two four\n")  # as many words: another digest, the same model
    (package / "hold").touch()
    process = start(package)
    work = package.parent / "store" / "work"
    wait_for(lambda: any(file.name.startswith("000002") for file in work.rglob("*-*")), process)
    wait_for(lambda: any('"at": 3' in file.read_text() for file in work.rglob("metrics.jsonl")), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (package / "hold").unlink()

    state = run(package, unused=2)  # a parameter that no step reads

    assert ran(state) == ["train"]
    trained = index.last("train")
    assert trained.digest != whole.digest
    assert trained.outputs == whole.outputs
    assert [(line["name"], line["at"]) for line in trained.metrics] == [("loss", epoch) for epoch in (1, 2, 3, 4)]
    runs = mlflow_runs(package)
    assert runs["tiny"][:2] == ["FINISHED", "KILLED"]
    assert runs["train"][1] == "KILLED"
    assert not list((package.parent / "store" / "work" / "tiny").iterdir())


KILLED_AFTER_A_TABLE = """
import os, runpy, signal, sys
from alembic.ddl.impl import DefaultImpl
make = DefaultImpl.create_table
def create_table(*values, **named):
    make(*values, **named)
    os.kill(os.getpid(), signal.SIGKILL)
DefaultImpl.create_table = create_table
sys.argv = ["tiny", "run"]
runpy.run_module("tiny", run_name="__main__")
"""


def test_a_run_that_is_killed_while_the_store_is_created_is_started_again(tmp_path: Path):
    """MLflow's tables are all there, or none: it refuses some of them."""
    package = tiny.write(tmp_path)
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    killed = subprocess.run([sys.executable, "-c", KILLED_AFTER_A_TABLE], env={**os.environ, "PYTHONPATH": paths})
    assert killed.returncode == -signal.SIGKILL

    assert ran(run(package)) == ["data", "train", "evaluate"]
    assert not (tmp_path / "store" / "new-database").exists()


def test_two_runs_at_once_follow_each_other(tmp_path: Path):
    """On a store that does not exist yet: the second waits, and finds everything done. Nothing is written elsewhere."""
    package, elsewhere = tiny.write(tmp_path / "pipeline"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    processes = [start(package, cwd=elsewhere, stderr=subprocess.PIPE) for _ in range(2)]
    assert [process.communicate()[1] for process in processes] == [b"", b""], "no warning of MLflow's"
    assert [process.returncode for process in processes] == [0, 0]
    assert mlflow_runs(package)["tiny"] == ["FINISHED"]
    assert not list(elsewhere.iterdir())


def test_status_says_what_a_run_would_do(package: Path):
    _append("train.py")(package)
    states = Runner(tiny.pipeline(package)).states()
    assert [state.state for state in states] == ["finished", "pending", "pending"]
    assert states[1].why == "changed: sources tiny.train"
    assert states[2].why == "waits for train"


def test_an_open_run_of_the_caller_is_not_touched(package: Path, monkeypatch: pytest.MonkeyPatch):
    """Neither one that is active in this process, nor one that the environment names."""
    import mlflow

    before = mlflow_runs(package)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # which the next line sets
    mlflow.set_tracking_uri(f"sqlite:///{package.parent / 'store' / 'mlflow.db'}")
    with mlflow.start_run(run_name="own") as own:
        monkeypatch.setenv("MLFLOW_RUN_ID", own.info.run_id)
        _append("evaluate.py")(package)
        assert ran(run(package)) == ["evaluate"]
        assert mlflow.active_run().info.run_id == own.info.run_id
        assert mlflow.get_run(own.info.run_id).info.status == "RUNNING"
    mlflow.set_tracking_uri("")
    after = mlflow_runs(package)
    assert {name: len(found) - len(before[name]) for name, found in after.items()} == dict.fromkeys(
        ("tiny", "data", "train", "evaluate"), 1
    )


def test_names_of_metrics_may_be_anything(package: Path):
    """MLflow gets what it allows, the index and the report what the step said."""
    names = ["recall A:B", "recall été", "recall T-shirt/top", "it's & so"]
    _append("data.py", f"    for name in {names!r}:\n        context.metric(name, 1)\n")(package)

    state = run(package)

    assert set(names) <= set(Index(package.parent / "store", "tiny").last("data").last_metrics())
    report = (package.parent / "store" / "reports" / f"{state.id}.html").read_text()
    assert all(html.escape(name) in report for name in names)


def test_a_run_that_was_deleted_in_mlflow_is_forgotten(package: Path):
    """Its outputs are used as long as they are there; without them the steps run again."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{package.parent / 'store' / 'mlflow.db'}")
    for each in client.search_runs([client.get_experiment_by_name("tiny").experiment_id]):
        client.delete_run(each.info.run_id)
    _append("evaluate.py")(package)
    assert ran(run(package)) == ["evaluate"]

    shutil.rmtree(package.parent / "store" / "artifacts")
    assert ran(run(package)) == ["data", "train", "evaluate"]
    assert run(package) is None


def test_a_store_that_was_moved_runs_again_in_its_new_place(package: Path):
    """It says which outputs are missing, and writes nothing into the old place."""
    old, new = package.parent, package.parent.with_name("moved")
    shutil.move(old, new)

    state = run(new / "tiny")

    assert ran(state) == ["data", "train", "evaluate"]
    assert f"output words.txt is missing from {old}" in state.steps[0].why
    assert not old.exists()
    assert run(new / "tiny") is None


def test_each_of_two_interrupted_runs_goes_on_from_its_own_checkpoint(package: Path):
    """They have the same name and other parameters."""
    store = package.parent / "store"
    (package / "hold").touch()
    for rate in (2, 3):
        process = start(package, f"--set=rate={rate}")
        wait_for(lambda n=rate - 1: len(list(store.glob("work/tiny/train-*/checkpoints/000002-*"))) == n, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    (package / "hold").unlink()

    for rate in (2, 3):
        assert ran(run(package, rate=rate)) == ["train", "evaluate"]
        model = Path(Index(store, "tiny").last("train").folder) / "model.txt"
        assert model.read_text() == "".join(f"{epoch} {3 * rate}!\n" for epoch in range(1, tiny.N_EPOCHS + 1))


def test_a_step_that_finished_elsewhere_is_reused_by_its_digest(
    tmp_path: Path, made_once: MadeOnce, monkeypatch: pytest.MonkeyPatch
):
    """With a shared record, another store downloads the outputs; one whose bytes are not what was recorded runs again."""
    shutil.copyfile(made_once(_finished) / "store" / "mlflow.db", tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    first, second = tiny.write(tmp_path / "first"), tiny.write(tmp_path / "second")
    assert ran(run(first, rate=7)) == ["train", "evaluate"], "data was in the copied record"

    assert run(second, rate=7) is None
    model = Path(Index(second.parent / "store", "tiny").last("train").folder) / "model.txt"
    assert model.is_relative_to(second.parent / "store")
    assert model.read_text().startswith("1 21!")

    recorded = Path(Index(first.parent / "store", "tiny").last("train").folder) / "model.txt"
    recorded.write_text("changed")
    third = tiny.write(tmp_path / "third")
    assert ran(run(third, rate=7)) == ["train"]
