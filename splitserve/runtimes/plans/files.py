"""``plan.json`` and ``plan.npz``: a plan as data. Both come from whoever can write to the model repository: everything is checked
before a row is computed.
"""

from __future__ import annotations

import io
import unicodedata
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from splitserve.arrays import Array
from splitserve.repository.archives import check_npz
from splitserve.repository.manifest import PLAN_ARRAYS_FILE, PLAN_FILE, BundleError, Rows
from splitserve.runtimes.plans import encoders, operations, pictures, statistics, words
from splitserve.runtimes.plans.layouts import Layout, Operation, PlanError, Run, StepArrays
from splitserve.runtimes.rows import read_columns
from splitserve.signature import TensorSpec
from splitserve.tensors import Tensor

FORMAT = 1
MAX_STEPS = 10_000
MAX_JSON_BYTES = 256 * 1024**2

_MODULES = (operations, encoders, statistics, words, pictures)

OPERATIONS: dict[str, type[Operation]] = {
    str(each.__struct_config__.tag): each
    for module in _MODULES
    for each in vars(module).values()
    if isinstance(each, type)
    and issubclass(each, Operation)
    and each.__module__ == module.__name__
    and not each.__name__.startswith("_")
}
"""The closed list of operations, by name."""

PlanStep = tuple[Operation, Mapping[str, Array]]
"""An operation with its arrays by name."""


class _PlanFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``plan.json``. ``fingerprint``: of the features, as in the manifest. ``requires``: versions of what operations depend on
    beside numpy, by name.
    """

    format: int
    steps: list[msgspec.Raw]
    fingerprint: str = ""
    requires: dict[str, str] = {}


class _Format(msgspec.Struct, frozen=True):
    format: int


class _Head(msgspec.Struct, frozen=True):
    operation: str
    version: int


# Created at import: two threads that create a type's first decoder at the same time crash the process.
_format_decoder = msgspec.json.Decoder(_Format)
_head_decoder = msgspec.json.Decoder(_Head)
_file_decoder = msgspec.json.Decoder(_PlanFile)
_step_decoders: dict[str, msgspec.json.Decoder[Operation]] = {
    name: msgspec.json.Decoder(each) for name, each in OPERATIONS.items()
}


class Plan:
    """Request tensors -> features (n_rows, n_features); pure, so safe to call from several threads."""

    def __init__(self, rows: Rows, specs: Sequence[TensorSpec], steps: Sequence[tuple[Run, tuple[int, ...]]]) -> None:
        self._rows, self._specs, self._steps = rows, specs, steps

    def __call__(self, tensors: Sequence[Tensor]) -> Array:
        """Args:
            tensors: in the signature's order, checked against it, with a row at least.

        Raises:
            InvalidInput: an element of a text column is not UTF-8, or the bytes are not elements.
            RefusedValue: the transforms refuse a value.
        """
        values: list[Any] = [read_columns(self._rows, self._specs, tensors)]
        with np.errstate(all="ignore"):  # a caller's values must not cause warnings in the log
            for run, places in self._steps:
                values.append(run(*[values[place] for place in places]))
        features: Array = values[-1]
        return features


def request_layout(rows: Rows, specs: Sequence[TensorSpec]) -> Layout:
    """The layout of the value 0.

    Raises:
        PlanError: there are no such requests.
    """
    if rows.form == "frame" and rows.columns:
        return Layout("request", columns=rows.columns)
    if rows.form != "array" or len(rows.columns) != 1 or len(specs) != 1:
        raise PlanError("the manifest's rows are neither a frame nor an array")
    return Layout("request", inner=specs[0].wire_shape[1:], columns=rows.columns)


def bind(step: Operation, arrays: Mapping[str, Array], layouts: Sequence[Layout]) -> tuple[Run, Layout]:
    """What computes a step, and the layout of its value.

    Raises:
        PlanError: it does not fit the values before it.
    """
    if not step.of or any(not 0 <= place < len(layouts) for place in step.of):
        raise PlanError(f"expected numbers of values before it, got {list(step.of)[:8]}")
    own = StepArrays(arrays)
    run, layout = step.bind([layouts[place] for place in step.of], own)
    own.end()
    return run, layout


def is_exact(steps: Sequence[PlanStep]) -> bool:
    """Whether every operation is exact."""
    return all(step.IS_EXACT for step, _ in steps)


def encode(steps: Sequence[PlanStep], fingerprint: str = "") -> tuple[bytes, bytes]:
    """The contents of ``plan.json`` and ``plan.npz``, the same each time.

    Raises:
        PlanError: a word is not Unicode text.
    """
    requires: dict[str, str] = {}
    for step, _ in steps:
        requires |= requirements(step)
    try:
        own = [step for step, _ in steps]
        head = {"format": FORMAT, "fingerprint": fingerprint, "requires": requires, "steps": own}
        text = msgspec.json.format(msgspec.json.encode(head), indent=1)
    except (ValueError, TypeError) as error:
        raise PlanError(f"a word is not text that can be written: {error}") from None
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:  # not numpy.savez, which writes the time
        for number, (_, arrays) in enumerate(steps, 1):
            for name, array in arrays.items():
                member = io.BytesIO()
                np.lib.format.write_array(member, array.astype(array.dtype.newbyteorder("<")), allow_pickle=False)
                info = zipfile.ZipInfo(f"{number}.{name}.npy")
                info.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(info, member.getvalue())
    return text, buffer.getvalue()


def requirements(step: Operation) -> dict[str, str]:
    """Versions here of what an operation depends on beside numpy."""
    if isinstance(step, words.CountWords | words.HashWords):
        return {"unicodedata": unicodedata.unidata_version}
    if isinstance(step, pictures.DecodePictures | pictures.ResizePictures):
        return pictures.versions()
    return {}


def decode(
    plan: bytes, arrays: bytes, rows: Rows, specs: Sequence[TensorSpec], output: TensorSpec, fingerprint: str = ""
) -> Plan:
    """The plan in ``plan.json`` and ``plan.npz``.

    Args:
        plan: contents of the one.
        arrays: contents of the other.
        rows: of the manifest.
        specs: the signature's inputs.
        output: the signature's output.
        fingerprint: of the manifest.

    Raises:
        BundleError: a file is damaged, too large, of another format, has an unknown operation, or its steps do not fit each other
            or the signature.
    """
    try:
        read = _read(plan)
        if read.fingerprint != fingerprint:
            raise PlanError(
                f"fingerprint of the features: expected {fingerprint} as in manifest.json, got {read.fingerprint[:80]}"
            )
        steps = _steps(read, arrays)
        return Plan(rows, specs, _bound(steps, rows, specs, output))
    except PlanError as error:
        raise BundleError(f"{PLAN_FILE}: {error}") from None


def required(plan: bytes) -> dict[str, str]:
    """What a plan requires, by name.

    Raises:
        BundleError: it cannot be read.
    """
    try:
        return _read(plan).requires
    except PlanError as error:
        raise BundleError(f"{PLAN_FILE}: {error}") from None


def missing_requirements(plan: bytes) -> list[str]:
    """What a plan requires and is another version here.

    Raises:
        BundleError: it cannot be read.
    """
    wanted = required(plan)
    here = {"unicodedata": unicodedata.unidata_version, **(pictures.versions() if wanted.keys() & {"pillow", "libjpeg"} else {})}
    return [
        f"the plan was published with {name} {version}, this service runs {here.get(name) or 'none'} (required: the same version)"
        for name, version in wanted.items()
        if here.get(name) != version
    ]


def _read(plan: bytes) -> _PlanFile:
    if len(plan) > MAX_JSON_BYTES:
        raise PlanError(f"has {len(plan)} bytes; the limit is {MAX_JSON_BYTES}")
    try:
        found = _format_decoder.decode(plan).format
        if found != FORMAT:
            raise PlanError(
                f"expected format {FORMAT}, got {found}; publish the bundle again, or serve it by a service that has it"
            )
        return _file_decoder.decode(plan)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PlanError(str(error)) from None


def _steps(read: _PlanFile, arrays: bytes) -> list[PlanStep]:
    if not 1 <= len(read.steps) <= MAX_STEPS:
        raise PlanError(f"expected 1 to {MAX_STEPS} steps, got {len(read.steps)}")
    by_step = _arrays(arrays)
    steps: list[PlanStep] = [(_operation(number, raw), by_step.pop(number, {})) for number, raw in enumerate(read.steps, 1)]
    if by_step:
        raise BundleError(f"{PLAN_ARRAYS_FILE}: has arrays of a step {min(by_step)}, which is not in {PLAN_FILE}")
    return steps


def _operation(number: int, raw: msgspec.Raw) -> Operation:
    try:
        head = _head_decoder.decode(raw)
        known = OPERATIONS.get(head.operation)
        if known is None:
            raise PlanError(
                f'step {number}: unknown operation "{head.operation[:64]}"; serve the bundle by a service that has it'
            )
        if head.version != known.VERSION:
            raise PlanError(f'step {number}: operation "{head.operation}": expected version {known.VERSION}, got {head.version}')
        return _step_decoders[head.operation].decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PlanError(f"step {number}: {error}") from None


def _arrays(data: bytes) -> dict[int, dict[str, Array]]:
    """By the number of their step and their name."""
    found: dict[int, dict[str, Array]] = {}
    try:
        check_npz(data, PLAN_ARRAYS_FILE)
        with np.load(io.BytesIO(data), allow_pickle=False) as members:
            for member in members.files:
                number, _, name = member.partition(".")
                if not number.isdecimal() or len(number) > 9 or name in found.get(int(number), {}):
                    raise BundleError(f"{PLAN_ARRAYS_FILE}: {member[:64]!r} is not the name of a step's array")
                found.setdefault(int(number), {})[name] = members[member]
    except BundleError:
        raise
    except Exception as error:  # numpy, zipfile and zlib each raise their own for a damaged file
        raise BundleError(f"{PLAN_ARRAYS_FILE}: not an npz file of plain arrays: {error}") from None
    return found


def _bound(
    steps: Sequence[PlanStep], rows: Rows, specs: Sequence[TensorSpec], output: TensorSpec
) -> list[tuple[Run, tuple[int, ...]]]:
    layouts, bound = [request_layout(rows, specs)], []
    for number, (step, arrays) in enumerate(steps, 1):
        try:
            run, layout = bind(step, arrays, layouts)
        except PlanError as error:
            raise PlanError(f'step {number} ("{step.__struct_config__.tag}"): {error}') from None
        layouts.append(layout)
        bound.append((run, step.of))
    last = layouts[-1]
    if last.kind != "numbers" or last.inner != output.wire_shape[1:]:
        raise PlanError(f"expected features {list(output.wire_shape[1:])} as in manifest.json, the last step makes {last}")
    return bound
