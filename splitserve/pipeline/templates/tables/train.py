"""train: ``train.csv`` -> ``pipeline.skops``, and what it answers on the test rows: ``expected.json``, ``confusion.json``."""

from __future__ import annotations

import json

import pandas as pd
import skops.io
from sklearn.metrics import accuracy_score, confusion_matrix, log_loss, recall_score

from splitserve.pipeline import Context

from .model import make_model


def train(context: Context) -> None:
    """Fit on the train rows, measure on the test rows."""
    values = context.parameters
    target = values["target"]
    train_rows, test_rows = pd.read_csv(context.input("data/train.csv")), pd.read_csv(context.input("data/test.csv"))
    model = make_model(max_iter=values["max_iter"], learning_rate=values["learning_rate"], seed=values["seed"])
    model.fit(train_rows.drop(columns=target), train_rows[target])

    labels = test_rows[target]
    found, probabilities = model.predict(test_rows.drop(columns=target)), model.predict_proba(test_rows.drop(columns=target))
    classes = [str(name) for name in model.classes_]
    context.metric("accuracy", accuracy_score(labels, found))
    context.metric("loss", log_loss(labels, probabilities, labels=model.classes_))
    for name, recall in zip(classes, recall_score(labels, found, labels=model.classes_, average=None), strict=True):
        context.metric(f"recall {name}", recall)
    matrix = confusion_matrix(labels, found, labels=model.classes_).tolist()
    (context.outputs / "confusion.json").write_text(json.dumps({"classes": classes, "counts": matrix}))
    (context.outputs / "expected.json").write_text(json.dumps([str(label) for label in found]))
    skops.io.dump(model, context.outputs / "pipeline.skops")
