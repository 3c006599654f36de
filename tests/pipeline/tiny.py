"""A small pipeline for tests of the runner: written into a folder, with steps that need nothing but Python."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from splitserve.pipeline.declaration import Step, TrainingPipeline
from splitserve.pipeline.index import RunState
from splitserve.pipeline.runner import Runner

N_EPOCHS = 4

FILES = {
    "__init__.py": "",
    "__main__.py": """
        import sys
        from pathlib import Path
        from splitserve.pipeline.commands import main
        from tests.pipeline.tiny import pipeline
        sys.exit(main(pipeline(Path(__file__).parent)))
    """,
    "words.txt": "one two three\n",
    "lock.txt": "numpy==2.0.0 \\\n    --hash=sha256:00\n",
    "helper.py": "from tiny.deeper import SUFFIX\n",
    "deeper.py": "SUFFIX = '!'  # a comment\n",
    "data.py": """
        def data(context):
            words = context.file("words").read_text().split()
            (context.outputs / "words.txt").write_text("\\n".join(words))
            context.metric("words", len(words))
    """,
    "train.py": """
        import os
        import time
        from pathlib import Path

        from tiny.helper import SUFFIX

        def train(context):
            words = context.input("data/words.txt").read_text().split()
            found = context.checkpoints.newest()
            epoch, text = (found[0], found[1].decode()) if found else (0, "")
            context.forget_metrics(after=epoch)
            while epoch < context.parameters["epochs"]:
                epoch += 1
                text += f"{epoch} {len(words) * context.parameters['rate']}{SUFFIX}\\n"
                context.metric("loss", context.parameters["loss"] or 1 / epoch, at=epoch)
                held = Path(__file__).with_name("hold")
                while epoch == 3 and held.exists():
                    time.sleep(0.01)
                context.checkpoints.save(epoch, text.encode())
            (context.outputs / "model.txt").write_text(text)
    """,
    "evaluate.py": """
        def evaluate(context):
            model = context.input("train/model.txt")
            context.fail_unless(len(model.read_text().splitlines()) >= context.parameters["floor"], "fewer epochs than the floor")
            with model.open("a") as file:
                file.write("written into the input")
            (context.outputs / "evaluation.txt").write_text("good")
    """,
}


def write(folder: Path) -> Path:
    """The package ``tiny`` below a folder."""
    package = folder / "tiny"
    package.mkdir(parents=True)
    for name, content in FILES.items():
        (package / name).write_text(textwrap.dedent(content))
    return package


def pipeline(package: Path, **changed: Any) -> TrainingPipeline:
    """Its declaration; ``lock`` and ``python`` of train, and parameters, can be others."""
    declared = TrainingPipeline(
        name="tiny",
        package="tiny",
        folder=package,
        parameters={"words": "words.txt", "rate": 0.1, "epochs": N_EPOCHS, "loss": 0, "floor": 1, "unused": 1},
        steps=[
            Step("data", ".data:data", files=("words",)),
            Step("train", ".train:train", inputs=("data",), parameters=("rate", "epochs", "loss"), lock="lock.txt",
                 environment=("TINY_SWITCH",)),
            Step("evaluate", ".evaluate:evaluate", inputs=("train/model.txt",), parameters=("floor",)),
        ],
        store=package.parent / "store",
    )  # fmt: skip
    return declared.with_parameters(changed)


def run(package: Path, *, first: str = "", until: str = "", **changed: Any) -> RunState | None:
    """Run it in this process."""
    return Runner(pipeline(package, **changed)).run(first=first, until=until)


def ran(state: RunState | None) -> list[str]:
    """The steps that were not reused."""
    return [step.step for step in state.steps if step.state != "reused"] if state else []
