"""Generate the Python stubs in splitserve/api from the .proto files next to this script.

``python protos/generate.py`` writes them; ``--check`` writes nothing and exits 1 if the committed ones differ.

The generated modules register their messages in a descriptor pool of splitserve's own instead of protobuf's default one:
tritonclient, kserve and mlserver each register the package ``inference`` there, and a second registration of a name is an error.
They import each other below ``splitserve.api``.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

PROTOS = Path(__file__).parent
API = PROTOS.parent / "splitserve" / "api"
DEFAULT_POOL = ("from google.protobuf import descriptor_pool as _descriptor_pool", "_descriptor_pool.Default()")
OWN_POOL = ("from splitserve.api import pool as _descriptor_pool", "_descriptor_pool.POOL")
IMPORT, OWN_IMPORT = "from inference import", "from splitserve.api.inference import"


def generate(into: Path) -> None:
    """Run the compiler of the pinned grpcio-tools and swap the pool."""
    sources = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}", f"--python_out={into}", f"--pyi_out={into}", *sources],
        check=True,
    )
    for module in into.rglob("*_pb2.py"):
        text = module.read_text()
        for default, own in zip(DEFAULT_POOL, OWN_POOL, strict=True):
            if text.count(default) != 1:
                raise SystemExit(f"{module.name}: expected one {default}, so that one replacement isolates its messages")
            text = text.replace(default, own)
        module.write_text(text)
    for module in into.rglob("*_pb2.py*"):
        module.write_text(module.read_text().replace(IMPORT, OWN_IMPORT))


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        fresh = {path.relative_to(scratch): path.read_bytes() for path in Path(scratch).rglob("*_pb2.py*")}
    if "--check" in sys.argv[1:]:
        stale = [str(path) for path, text in fresh.items() if not (API / path).exists() or (API / path).read_bytes() != text]
        if stale:
            raise SystemExit(f"stale stubs: {', '.join(stale)}; run `make stubs`")
        return
    for path, text in fresh.items():
        (API / path).parent.mkdir(parents=True, exist_ok=True)
        (API / path).write_bytes(text)


if __name__ == "__main__":
    main()
