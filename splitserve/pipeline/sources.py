"""Which modules of the project a step reaches by imports, and a digest of the code of each.

A module is the project's if it lies neither in Python's own folders nor in ``site-packages``, which are what the lock fixes.
Files are parsed, not imported. Imports in functions count; those under ``if TYPE_CHECKING:`` do not. Modules that are imported by
a computed name are not found; a step names them in ``extra_modules``. The digest is of the syntax tree, without comments.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from splitserve.pipeline.context import write_durably


class SourceError(Exception):
    """A module that a step names is not there, or cannot be parsed."""


class _Parsed(NamedTuple):
    digest: str
    imports: list[str]


class Sources:
    """Finds modules on ``paths``. What was parsed is kept in the file ``cache`` by the digest of the bytes.

    Args:
        paths: as ``sys.path``.
        cache: may be missing or broken.
    """

    def __init__(self, paths: Iterable[str], cache: Path) -> None:
        installed = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
        self._paths = [Path(path or ".").resolve() for path in paths if os.path.realpath(path or ".") not in installed]
        self._paths = [path for path in self._paths if path.is_dir()]
        self._cache = cache
        self._parsed: dict[str, _Parsed] = {}
        with suppress(OSError, ValueError, TypeError, AttributeError):
            stored = json.loads(cache.read_text())
            self._parsed = {key: _Parsed(digest, imports) for key, (digest, imports) in stored.items()}
        self._n_stored = len(self._parsed)

    def reached(self, modules: Iterable[str]) -> dict[str, str]:
        """Digest of each module of the project that the given ones reach, themselves and their packages included, by name.

        Raises:
            SourceError: one of the given is in the project, and cannot be parsed.
        """
        found: dict[str, str] = {}
        waiting = [part for module in modules for part in _with_packages(module)]
        while waiting:
            name = waiting.pop()
            if name in found or (file := self.file_of(name)) is None:
                continue
            parsed = self._parse(file)
            found[name] = parsed.digest
            package = name if file.name == "__init__.py" else name.rpartition(".")[0]
            for imported in parsed.imports:
                waiting += _with_packages(_absolute(imported, package))
        self._store()
        return dict(sorted(found.items()))

    def file_of(self, name: str) -> Path | None:
        """The file of a module of the project; None for a module that is installed, built in, or not there."""
        parts = name.split(".")
        if parts[0] in sys.builtin_module_names or parts[0] in sys.stdlib_module_names:
            return None
        for path in self._paths:
            base = path.joinpath(*parts)
            for file in (base / "__init__.py", base.with_suffix(".py")):
                if file.is_file() and "site-packages" not in file.parts:
                    return file
        return None

    def _parse(self, file: Path) -> _Parsed:
        content = file.read_bytes()
        key = hashlib.sha256(content).hexdigest() + f"-{sys.version_info[0]}.{sys.version_info[1]}"
        if key not in self._parsed:
            try:
                tree = ast.parse(content, filename=str(file))
            except SyntaxError as error:
                raise SourceError(f"{file}: {error}") from None
            self._parsed[key] = _Parsed(hashlib.sha256(ast.dump(tree).encode()).hexdigest(), sorted(set(_imports(tree))))
        return self._parsed[key]

    def _store(self) -> None:
        if len(self._parsed) == self._n_stored:
            return
        write_durably(self._cache, json.dumps(self._parsed).encode())
        self._n_stored = len(self._parsed)


def _imports(node: ast.AST) -> Iterator[str]:
    """Names that are imported, with leading dots; of ``from a import b`` both ``a`` and ``a.b``, which may be a module."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        module = "." * node.level + (node.module or "")
        yield module
        yield from (f"{module}{'' if module.endswith('.') else '.'}{alias.name}" for alias in node.names)
    elif isinstance(node, ast.If) and _is_type_checking(node.test):
        for statement in node.orelse:
            yield from _imports(statement)
    else:
        for child in ast.iter_child_nodes(node):
            yield from _imports(child)


def _is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def _absolute(name: str, package: str) -> str:
    level = len(name) - len(name.lstrip("."))
    if not level:
        return name
    parts = package.split(".")
    base = parts[: len(parts) - level + 1]
    return ".".join([*base, *filter(None, [name[level:]])])


def _with_packages(name: str) -> list[str]:
    """``a.b.c`` -> itself, ``a.b`` and ``a``, whose ``__init__`` runs first."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
