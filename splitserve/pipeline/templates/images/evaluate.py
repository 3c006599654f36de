"""evaluate: start what was built, verify it, and send it the test images as files, over REST and gRPC."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np

from splitserve.pipeline import Context
from splitserve.pipeline.report import WRONG_FILE
from splitserve.pipeline.serving import labels_of, running_build, time_requests

from .data import read_files

N_WRONG_SHOWN = 50


def evaluate(context: Context) -> None:
    """Every served label has to be that of the trained network, and enough of them right."""
    values = context.parameters
    files = read_files(context.input("data/test_files.npz"))
    classes = json.loads(context.input("data/classes.json").read_text())
    with np.load(context.input("data/test.npz")) as stored:
        labels = [classes[index] for index in stored["labels"].tolist()]
    expected = json.loads(context.input("train/expected.json").read_text())
    with running_build(context) as system:
        n_golden = system.verify(values["model"])
        found = {}
        for transport, client in system.clients.items():
            served = labels_of(client.infer(values["model"], {"image": files}, chunk_rows=64))
            n_other = sum(a != b for a, b in zip(served, expected, strict=True))
            context.fail_unless(not n_other, f"over {transport}, {n_other} of {len(expected)} labels differ from training's")
            found[transport] = sum(a == b for a, b in zip(served, labels, strict=True)) / len(labels)
            p50_ms, p99_ms = time_requests(client, values["model"], files, values["n_timed"], input_name="image")
            context.metric(f"{transport} p50 ms", p50_ms)
            context.metric(f"{transport} p99 ms", p99_ms)
    _write_wrong(context, files, labels, expected)
    accuracy = min(found.values())
    context.metric("accuracy", accuracy)
    context.fail_unless(
        accuracy >= values["min_accuracy"], f"accuracy {accuracy:.4f} is below min_accuracy, {values['min_accuracy']}"
    )
    result = {"accuracy": accuracy, "images": len(labels), "golden rows": n_golden}
    (context.outputs / "evaluation.json").write_text(json.dumps(result))


def _write_wrong(context: Context, files: Any, labels: list[str], found: list[str]) -> None:
    """The first images with a wrong label, for the report."""
    wrong = [index for index, label in enumerate(found) if label != labels[index]][:N_WRONG_SHOWN]
    shown = [{"png": base64.b64encode(files[index, 0]).decode(), "true": labels[index], "found": found[index]} for index in wrong]
    (context.outputs / WRONG_FILE).write_text(json.dumps(shown))
