"""``splitserve index``: the index of a model repository, for web servers."""

from __future__ import annotations

import sys
from pathlib import Path

from splitserve.repository.folder import Repository
from splitserve.repository.manifest import BundleError
from splitserve.repository.sources import index


def run(root: Path) -> int:
    """Write ``index.json``; 1 if that fails or an invalid bundle was omitted."""
    if not root.is_dir():
        print(f"{root}: no such folder", file=sys.stderr)
        return 1
    try:
        found, problems = index.build(Repository(root))
        path = index.write(root, found)
    except (BundleError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    for problem in problems:
        print(f"omitted: {problem}", file=sys.stderr)
    print(f"{path}: {len(found.bundles)} bundles, {len(found.releases)} releases, {len(found.routes)} routes")
    return int(bool(problems))
