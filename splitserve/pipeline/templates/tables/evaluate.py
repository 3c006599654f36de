"""evaluate: start what was built, verify it, and send it the test rows over REST and gRPC."""

from __future__ import annotations

import json

import pandas as pd

from splitserve.pipeline import Context
from splitserve.pipeline.serving import labels_of, running_build, time_requests


def evaluate(context: Context) -> None:
    """Every served label has to be that of the trained pipeline, and enough of them right."""
    values = context.parameters
    test = pd.read_csv(context.input("data/test.csv"))
    rows, labels = test.drop(columns=values["target"]), [str(label) for label in test[values["target"]]]
    expected = json.loads(context.input("train/expected.json").read_text())
    with running_build(context) as system:
        n_golden = system.verify(values["model"])
        found = {}
        for transport, client in system.clients.items():
            served = labels_of(client.infer(values["model"], rows, chunk_rows=64))
            n_other = sum(a != b for a, b in zip(served, expected, strict=True))
            context.fail_unless(not n_other, f"over {transport}, {n_other} of {len(expected)} labels differ from training's")
            found[transport] = sum(a == b for a, b in zip(served, labels, strict=True)) / len(labels)
            p50_ms, p99_ms = time_requests(client, values["model"], rows, values["n_timed"])
            context.metric(f"{transport} p50 ms", p50_ms)
            context.metric(f"{transport} p99 ms", p99_ms)
    accuracy = min(found.values())
    context.metric("accuracy", accuracy)
    context.fail_unless(
        accuracy >= values["min_accuracy"], f"accuracy {accuracy:.4f} is below min_accuracy, {values['min_accuracy']}"
    )
    result = {"accuracy": accuracy, "rows": len(labels), "golden rows": n_golden}
    (context.outputs / "evaluation.json").write_text(json.dumps(result))
