"""``python -m tests.system.named MODULE NAME=ADDRESS,ADDRESS``: a service for which a name has these addresses."""

from __future__ import annotations

import runpy
import sys

from splitserve.remote import replicas


def main(module: str, *names: str) -> None:
    """Run a module as a program that resolves these names."""
    known = {name: addresses.split(",") for name, _, addresses in (each.partition("=") for each in names)}

    async def resolve(host: str, port: int) -> list[str]:
        return [f"ipv4:{address}:{port}" for address in known[host]]

    replicas.resolve_addresses = resolve
    sys.argv[1:] = []
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
