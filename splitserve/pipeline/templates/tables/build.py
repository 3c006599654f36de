"""build: the fitted pipeline -> both bundles and a release that is proven, in the model repository ``models``."""

from __future__ import annotations

import pandas as pd
import skops.io

from splitserve.pipeline import Context
from splitserve.pipeline.images import build_images
from splitserve.publishing import publish


def build(context: Context) -> None:
    """The pipeline that was trained is the one that is published: nothing is copied."""
    values = context.parameters
    file = context.input("train/pipeline.skops")
    pipeline = skops.io.load(file, trusted=skops.io.get_untrusted_types(file=file))  # written by this pipeline's train step
    rows = pd.read_csv(context.input("data/train.csv")).drop(columns=values["target"])
    models = context.outputs / "models"
    published = publish(pipeline, rows, name=values["model"], repository=models)
    context.metric("worst difference of the split", published.worst_difference)
    n_hard = sum(published.hard_rows.values())
    print(f"{published.name} {published.pair}: {published.n_checked} rows and {n_hard} hard rows compared")
    if values["serve"] == "images":
        build_images(context, models)
    else:
        context.fail_unless(values["serve"] == "processes", f'serve: expected "processes" or "images", got "{values["serve"]}"')
