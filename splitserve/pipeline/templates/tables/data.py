"""data: one CSV file -> ``train.csv`` and ``test.csv``."""

from __future__ import annotations

import hashlib

import pandas as pd
from sklearn.model_selection import train_test_split

from splitserve.pipeline import Context


def split(context: Context) -> None:
    """Check the file, and split its rows, each class in the same share."""
    values = context.parameters
    content = context.file("data").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    context.fail_unless(
        values["data_sha256"] in (None, digest),
        f"{values['data']}: expected SHA-256 {values['data_sha256']}, got {digest}: it was changed, or cut short. If that "
        "is meant, set the parameter data_sha256 to the new digest, or to null",
    )
    rows = pd.read_csv(context.file("data"))
    target = values["target"]
    context.fail_unless(target in rows, f"{values['data']}: no column {target}; there are: {', '.join(rows)}")
    n_unlabelled = int(rows[target].isna().sum())
    context.fail_unless(not n_unlabelled, f"{values['data']}: {n_unlabelled} rows have no {target}")
    rarest = rows[target].value_counts().min()
    context.fail_unless(rarest >= 2, f"{values['data']}: a {target} has {rarest} row, expected at least 2 of each")
    train, test = train_test_split(rows, test_size=values["test_share"], random_state=values["seed"], stratify=rows[target])
    train.to_csv(context.outputs / "train.csv", index=False)
    test.to_csv(context.outputs / "test.csv", index=False)
    context.metric("train rows", len(train))
    context.metric("test rows", len(test))
