"""``splitserve pipeline new``: a copy of a template, one's own from then on."""

from __future__ import annotations

import shutil
from pathlib import Path

TEMPLATES = Path(__file__).with_name("templates")


def templates() -> list[str]:
    """Their names."""
    return sorted(folder.name for folder in TEMPLATES.iterdir() if (folder / "pipeline.py").exists())


def copy_template(folder: Path, template: str) -> None:
    """Copy a template into a new folder, whose name becomes the package's and the pipeline's.

    Raises:
        ValueError: the folder exists, its name cannot be a package's, or there is no such template.
    """
    folder = folder.resolve()
    if template not in templates():
        raise ValueError(f'template "{template}" does not exist; there are: {", ".join(templates())}')
    if not folder.name.isidentifier():
        raise ValueError(f"{folder}: the folder is a Python package, so its name has to be an identifier, e.g. my_model")
    if folder.exists():
        raise ValueError(f"{folder} exists; name a new folder")
    shutil.copytree(TEMPLATES / template, folder, ignore=shutil.ignore_patterns("__pycache__"))
    declaration = folder / "pipeline.py"
    declaration.write_text(declaration.read_text().replace(f'name="{template}"', f'name="{folder.name}"'))
