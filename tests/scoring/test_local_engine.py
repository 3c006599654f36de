"""The release of a repository in worker processes: its answers, what kills it, what the command prints."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import splitserve
from splitserve import Client
from splitserve.runtimes.preprocessor import Preprocessor
from splitserve.scoring import ScoringError, batch_schema, score
from splitserve.scoring.runs import ScoringOptions, plan, run
from splitserve.scoring.summary import Summary
from splitserve.tensors import Tensor
from tests.command_line import run_command
from tests.demo_models import Demos
from tests.scoring.here import Here
from tests.system.processes import System, wait_until

ROOT = Path(__file__).parents[2]
PENGUINS = ROOT / "examples" / "penguins.csv"
COMMAND = Path(sys.executable).with_name("splitserve")

pytestmark = [pytest.mark.xdist_group("scoring"), pytest.mark.heavy]


def command(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, "batch", *map(str, arguments)], cwd=cwd, capture_output=True, text=True)


def in_process(model: str, where: Path, output: Path, repository: Path, **chosen: Any) -> Summary:
    """As `score`, without starting processes."""
    options = ScoringOptions(repository=str(repository), **chosen)
    return run(plan(model, str(where), str(output), options), options, engine=Here())


@pytest.fixture(scope="module")
def many(demos: Demos, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40,000 penguins as Parquet, in row groups of 10,000."""
    frame = demos.models["penguins"].rows
    repeated = pd.concat([frame] * 117, ignore_index=True).iloc[:40_000]
    path = tmp_path_factory.mktemp("many") / "many.parquet"
    repeated.assign(id=range(len(repeated))).to_parquet(path, row_group_size=10_000, index=False)
    return path


@pytest.fixture(scope="module")
def fused(demos: Demos) -> Iterator[System]:
    running = System(demos.repository, is_fused=True).wait_until_settled()
    yield running
    running.stop()


def test_the_example_draws_its_scores(demos: Demos, tmp_path: Path) -> None:
    """As its first line says; again where the output exists."""
    example = ROOT / "examples" / "batch" / "plot_scores.py"

    subprocess.run([sys.executable, example, demos.repository], cwd=tmp_path, check=True, capture_output=True)

    assert (tmp_path / "scores.svg").read_text().count("<rect") == 60
    assert len(pq.read_table(tmp_path / "scores.parquet")) == 344


def test_the_document_s_programs_run(demos: Demos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that need no engine, one after the other, as they stand, where there are ./models and a table."""
    (tmp_path / "models").symlink_to(demos.repository)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    pd.read_csv(PENGUINS).to_parquet(tmp_path / "penguins.parquet", index=False)
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "batch.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    blocks = [block for block in blocks if "spark" not in block and "ray" not in block]
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    shutil.copy("penguins.parquet", "in/2026-01-31.parquet")

    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)  # in this process: the second loads the release here

    for _ in range(2):
        assert names["score_day"]("2026-01-31") == {"rows": 344, "errors": 0}
    assert len(pq.read_table("out/2026-01-31.parquet")) == 344


@pytest.mark.parametrize("model", ["penguins", "breast-cancer"])
def test_answers_are_those_of_the_running_system(demos: Demos, fused: System, tmp_path: Path, model: str) -> None:
    """Bit by bit, on the same rows."""
    rows = demos.models[model].rows
    frame = rows if model == "penguins" else pd.DataFrame({"features": list(rows)})
    frame.to_parquet(tmp_path / "t.parquet", index=False)
    with Client(fused.grpc) as client:
        online = client.infer(model, rows if model == "penguins" else {"features": rows}, chunk_rows=0)

    summary = in_process(model, tmp_path / "t.parquet", tmp_path / "out.parquet", demos.repository)

    found = pq.read_table(tmp_path / "out.parquet")
    assert summary.errors == 0
    labels = [label.decode() if isinstance(label, bytes) else label for label in online["label"].tolist()]
    assert found["label"].to_pylist() == labels
    names = [name for name in found.column_names if name.startswith("probabilities_")]
    batch = np.stack([found[name].to_numpy() for name in names], axis=1)
    np.testing.assert_array_equal(batch.view(np.uint32), online["probabilities"].view(np.uint32))


@pytest.mark.parametrize("face", ["grpc", "rest"])
def test_a_running_system_gives_the_answers_of_the_release(
    demos: Demos, fused: System, many: Path, tmp_path: Path, face: str
) -> None:
    """``--url``: bad rows apart, too, with the message of the transforms; no repository is needed."""
    frame = pd.read_parquet(many).iloc[:3_000]
    frame.loc[1_234, "bill_depth_mm"] = np.inf
    frame.to_parquet(tmp_path / "t.parquet", index=False)
    url = fused.grpc if face == "grpc" else f"http://{fused.http}"

    done = command("penguins", "t.parquet", "url.csv", "--keep", "id", "--url", url, "--workers", 1, cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    score("penguins", tmp_path / "t.parquet", tmp_path / "local.csv", repository=demos.repository, keep=["id"], workers=1)
    assert (tmp_path / "url.csv").read_text() == (tmp_path / "local.csv").read_text()
    (error,) = map(json.loads, (tmp_path / "url.errors.jsonl").read_text().splitlines())
    assert (error["id"], error["error_stage"]) == (1_234, "preprocess")
    assert "infinity" in error["error_message"]


def test_text_formats_mean_what_they_mean_online(demos: Demos, fused: System, tmp_path: Path) -> None:
    """An empty cell is missing; NA is missing in a number and text in text."""
    header = "island,bill_length_mm,bill_depth_mm,flipper_length_mm,body_mass_g,sex,year"
    (tmp_path / "t.csv").write_text(f"{header}\nDream,NA,18,190,,NA,2008\nNA,40,18.5,190,3700,,2007\n")
    nan = float("nan")
    rows = [["Dream", nan, 18.0, 190.0, nan, "NA", 2008.0], ["NA", 40.0, 18.5, 190.0, 3700.0, "", 2007.0]]
    with Client(fused.grpc) as client:
        online = client.infer("penguins", pd.DataFrame(rows, columns=header.split(",")))

    in_process("penguins", tmp_path / "t.csv", tmp_path / "out.parquet", demos.repository)

    found = pq.read_table(tmp_path / "out.parquet")
    assert found["probabilities_Adelie"].to_pylist() == online["probabilities"][:, 0].tolist()


PROGRAM = """
import sys
from splitserve.scoring.runs import ScoringOptions, plan, run
options = ScoringOptions(repository=sys.argv[1], keep=("id",), workers=2, shard_rows=8192)
run(plan("penguins", sys.argv[2], sys.argv[3], options), options)
"""


def test_a_run_that_is_killed_goes_on_and_gives_the_same_bytes(demos: Demos, many: Path, tmp_path: Path) -> None:
    """Killed when a shard is finished; the next process does the others."""
    options = ScoringOptions(repository=str(demos.repository), keep=("id",), workers=2, shard_rows=8192)
    whole = in_process("penguins", many, tmp_path / "whole.parquet", demos.repository, keep=("id",), shard_rows=8192)
    output = tmp_path / "killed.parquet"
    records = tmp_path / "killed.parquet.parts" / "_splitserve" / "shards"

    arguments = [sys.executable, "-c", PROGRAM, str(demos.repository), str(many), str(output)]
    with subprocess.Popen(arguments, start_new_session=True) as process:
        wait_until(lambda: output.exists() or (records.exists() and list(records.glob("part-*.json"))), "a finished shard")
        process.send_signal(signal.SIGKILL)
    summary = run(plan("penguins", str(many), str(output), options), options)

    assert output.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert 1 <= summary.resumed_shards <= summary.shards
    assert (summary.rows, summary.scored, summary.errors) == (whole.rows, whole.scored, whole.errors)


def test_exactly_the_bad_rows_fail_in_many(demos: Demos, many: Path, tmp_path: Path) -> None:
    """One in ten thousand, with the message of the transforms."""
    frame = pd.read_parquet(many)
    bad = [7, 10_007, 20_007, 39_999]
    frame.loc[bad, "bill_depth_mm"] = np.inf
    frame.to_parquet(tmp_path / "t.parquet", index=False)

    summary = in_process("penguins", tmp_path / "t.parquet", tmp_path / "out.parquet", demos.repository, keep=("id",))

    assert (summary.rows, summary.scored, summary.errors) == (40_000, 39_996, 4)
    errors = [json.loads(line) for line in (tmp_path / "out.errors.jsonl").read_text().splitlines()]
    assert [each["id"] for each in errors] == bad
    assert {each["error_stage"] for each in errors} == {"preprocess"}
    assert "infinity" in errors[0]["error_message"]
    kept = pq.read_table(tmp_path / "out.parquet")["id"].to_pylist()
    assert kept == [row for row in range(40_000) if row not in bad]


def test_ctrl_c_ends_a_run_which_goes_on_later(demos: Demos, tmp_path: Path) -> None:
    """It reaches the workers, too, as from a terminal: status 130, one line, no process. A worker waits here with its shard."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "sitecustomize.py").write_text(
        "import sys\n"
        "if '-m' in sys.orig_argv and 'splitserve.scoring.worker' in sys.orig_argv:\n"
        "    import os, signal\n"
        "    from splitserve.scoring import shards\n"
        "    def score(*_):\n"
        "        open('pid.new', 'w').write(str(os.getpid()))\n"
        "        os.replace('pid.new', 'pid')\n"
        "        while True:\n"
        "            signal.pause()\n"
        "    shards.ShardScorer.score = score\n"
    )
    arguments = [COMMAND, "batch", "penguins", PENGUINS, "out.csv", "--repository", demos.repository, "--workers", "1"]
    with subprocess.Popen(
        arguments,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "modules")},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    ) as process:
        wait_until((tmp_path / "pid").exists, "a worker with a shard")
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate()

    assert (process.returncode, said) == (130, "interrupted; the same command goes on\n")
    assert not (tmp_path / "out.csv").exists()
    assert not Path("/proc", (tmp_path / "pid").read_text()).exists()
    assert in_process("penguins", PENGUINS, tmp_path / "out.csv", demos.repository).scored == 344


def test_a_release_that_is_withdrawn_before_a_worker_has_loaded_it_does_not_score(demos: Demos, tmp_path: Path) -> None:
    """Between the plan and the first row here; the next command finds no release."""
    repository = tmp_path / "models"
    shutil.copytree(demos.repository / "penguins", repository / "penguins")
    options = ScoringOptions(repository=str(repository))
    planned = plan("penguins", str(PENGUINS), str(tmp_path / "out.csv"), options)

    splitserve.withdraw("penguins", 1, repository=repository)

    with pytest.raises(
        ScoringError, match=r"penguins/releases/0001-1\.1: the release was withdrawn or changed since the run began"
    ):
        run(planned, options, engine=Here())
    with pytest.raises(ScoringError, match='model "penguins" has no release'):
        plan("penguins", str(PENGUINS), str(tmp_path / "out.csv"), options)
    assert not (tmp_path / "out.csv").exists()


def test_a_worker_that_dies_is_named_by_its_shard(
    demos: Demos, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a run that hangs, nor a broken pool. A module of the caller's is what kills it here."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if '-m' in sys.orig_argv and 'splitserve.scoring.worker' in sys.orig_argv:\n"
        "    import signal\n"
        "    from splitserve.scoring import shards\n"
        "    shards.ShardScorer.score = lambda *_: os.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    with pytest.raises(ScoringError, match=r"the worker that scored .*many\.parquet from row 1 was ended by signal 11"):
        score("penguins", many, tmp_path / "out.parquet", repository=demos.repository, workers=1)


def test_golden_samples_are_replayed_before_the_first_row(demos: Demos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A release that answers otherwise than it is recorded does not score."""
    answer = Preprocessor.answer

    def swapped(self: Preprocessor, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return answer(self, tuple(msgspec.structs.replace(each, raw=each.raw[::-1]) for each in outputs))

    monkeypatch.setattr(Preprocessor, "answer", swapped)

    with pytest.raises(ScoringError, match='output "label" of golden sample 0'):
        in_process("breast-cancer", features(demos, tmp_path), tmp_path / "out.csv", demos.repository)

    assert not (tmp_path / "out.csv").exists()


def features(demos: Demos, folder: Path) -> Path:
    rows = demos.models["breast-cancer"].rows
    pd.DataFrame({"features": list(rows)}).to_parquet(folder / "features.parquet", index=False)
    return folder / "features.parquet"


def test_a_bundle_that_was_replaced_does_not_score(demos: Demos, tmp_path: Path) -> None:
    """Its digest is not that of the release."""
    shutil.copytree(demos.repository / "penguins", tmp_path / "models" / "penguins")
    model = tmp_path / "models" / "penguins" / "predict" / "1" / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"\0")

    with pytest.raises(ScoringError, match=r"penguins/predict/1: model\.onnx: "):
        in_process("penguins", PENGUINS, tmp_path / "out.csv", tmp_path / "models")

    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["nope", PENGUINS, "out.csv"], 1, 'there is no model "nope"; it has breast-cancer, digits, penguins'),
        (["penguins@9.9", PENGUINS, "out.csv"], 1, 'model "penguins" has no release of 9.9; released pairs: 1.1'),
        (["penguins", "absent.csv", "out.csv"], 1, "absent.csv: no such file or folder"),
        (["digits", PENGUINS, "out.csv"], 1, 'missing "image (lists of 64, or image_0 to image_63)"'),
        (["penguins", PENGUINS, "out.csv", "--max-errors", "many"], 2, "--max-errors many: expected a number of rows"),
        (["penguins", PENGUINS, "out.csv", "--sample", "2"], 2, "--sample: expected a share"),
        (["penguins", PENGUINS, "out.csv", "--keep", "idd"], 2, '--keep idd: there is no column "idd"'),
        (["penguins", "bad.csv", "out.csv"], 3, "too many rows failed: 1 of 1; --max-errors is 10%"),
    ],
    ids=["model", "version", "input", "columns", "max-errors", "sample", "keep", "bad-rows"],
)
def test_the_exit_status_says_what_was_wrong(
    demos: Demos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[object], status: int, message: str
) -> None:
    """1 for input, release and output, 2 for options, 3 for too many bad rows."""
    lines = PENGUINS.read_text().splitlines()
    (tmp_path / "bad.csv").write_text(f"{lines[0]}\n{lines[1].replace('39.1', 'long')}\n")

    monkeypatch.chdir(tmp_path)

    done = run_command("batch", *arguments, "--repository", demos.repository)

    assert (done.exit_code, message in done.stderr) == (status, True), done.stderr


def test_modules_of_the_working_directory_are_not_imported(demos: Demos, tmp_path: Path) -> None:
    """A file named as a module of Python's lies where people work."""
    (tmp_path / "csv.py").write_text("raise AssertionError('the csv.py of the working directory is imported')")

    done = command("penguins", PENGUINS, "scores.csv", "--repository", demos.repository, cwd=tmp_path)

    assert done.returncode == 0, done.stderr


def test_json_is_all_that_is_printed(demos: Demos, tmp_path: Path) -> None:
    """Progress goes to stderr, without carriage returns where it is no terminal."""
    done = command("penguins", PENGUINS, "out", "--to", "parquet", "--json", "--repository", demos.repository, cwd=tmp_path)

    summary = json.loads(done.stdout)
    assert (summary["rows"], summary["scored"], summary["errors"], summary["pair"]) == (344, 344, 0, "1.1")
    assert set(summary["stage_seconds"]) == {"read", "convert", "preprocess", "predict", "write"}
    assert "\r" not in done.stderr
    assert len(list((tmp_path / "out").glob("part-*.parquet"))) == 1


def test_a_dry_run_checks_and_writes_nothing(demos: Demos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan and an estimate."""
    monkeypatch.chdir(tmp_path)

    done = run_command("batch", "penguins", PENGUINS, "out.csv", "--dry-run", "--repository", demos.repository)

    assert done.exit_code == 0, done.stderr
    assert "344 rows of csv in 1 files, 1 shards" in done.stdout
    assert "columns not used: id, species" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_batches_of_a_caller_s_own_are_scored(demos: Demos, many: Path) -> None:
    """As many rows as there were, in order; a bad one has no answer and an error."""
    table = pq.read_table(many).slice(0, 500)
    batches = table.to_batches(max_chunksize=200)

    found = list(splitserve.score_batches("penguins", batches, repository=demos.repository, keep=["id"]))

    assert [batch.num_rows for batch in found] == [200, 200, 100]
    assert (found[0].schema.names[0], found[0].schema.names[-1]) == ("id", "error")
    assert found[0].schema == batch_schema("penguins", table.schema, repository=demos.repository, keep=["id"])
    assert all(batch["error"].null_count == batch.num_rows for batch in found)
    frame = table.to_pandas()
    frame.loc[3, "bill_depth_mm"] = np.inf
    (one,) = splitserve.score_batches("penguins", [pa.RecordBatch.from_pandas(frame)], repository=demos.repository, keep=["id"])
    assert one["error"][3].as_py().startswith("preprocess: INVALID_INPUT: the transforms refuse a row")
    assert (one["label"].null_count, one["label"][3].as_py()) == (1, None)
    assert one["label"][4].as_py() == found[0]["label"][4].as_py()


def test_pictures_are_rows(tmp_path: Path, made_once: Any) -> None:
    """One a file, with its name; what is damaged or no picture is an error of its row, other files are listed."""
    repository = made_once(publish_pictures)
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(20):
        Image.new("RGB", (10, 12), (number * 10, 0, 0)).save(folder / f"{number:02d}.png")
    (folder / "damaged.jpg").write_bytes(b"\xff\xd8\xff damaged")
    (folder / "text.png").write_text("no picture")
    (folder / "notes.txt").write_text("x")
    (folder / ".DS_Store").touch()

    summary = in_process("pictures", folder, tmp_path / "out.csv", repository, max_errors="2")

    found = pd.read_csv(tmp_path / "out.csv")
    assert found["file"].tolist() == [f"{number:02d}.png" for number in range(20)]
    errors = [json.loads(line) for line in (tmp_path / "out.errors.jsonl").read_text().splitlines()]
    assert [each["file"] for each in errors] == ["damaged.jpg", "text.png"]
    assert [each["error_file"] for each in errors] == [str(folder / "damaged.jpg"), str(folder / "text.png")]
    assert summary.first_error.startswith(f"{folder}/damaged.jpg: row 21: ")
    assert summary.skipped_files == (".DS_Store", "notes.txt")
    assert summary.exit_status == 0


def publish_pictures(folder: Path) -> None:
    import io

    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    from splitserve.transformers import DecodeImage, Flatten, NormaliseImage, ResizeImage

    def png(red: int) -> bytes:
        stream = io.BytesIO()
        Image.new("RGB", (10, 10), (red, 0, 0)).save(stream, "PNG")
        return stream.getvalue()

    rows = np.array([[png(red)] for red in range(0, 250, 8)], dtype=np.object_)
    pipeline = make_pipeline(DecodeImage(), ResizeImage(4), NormaliseImage(), Flatten(), LogisticRegression())
    pipeline.fit(rows, [red > 120 for red in range(0, 250, 8)])
    splitserve.publish(pipeline, rows, name="pictures", repository=folder)


def test_memory_is_flat(demos: Demos, many: Path, tmp_path: Path) -> None:
    """A reader never holds more than a few calls of rows: the shard of a large row group is read in pieces."""
    options = ScoringOptions(repository=str(demos.repository), shard_rows=8192)
    planned = plan("penguins", str(many), str(tmp_path / "out.parquet"), options)

    largest: list[int] = []
    run(planned, options, engine=Here(None, watch=largest.append))

    assert sum(largest) == 40_000
    assert max(largest) <= 8192
