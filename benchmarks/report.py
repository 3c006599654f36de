"""Tables for people, JSON for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.machine import Machine
from benchmarks.measuring import Measurement

RESULTS = Path(__file__).with_name("results")

_HEADERS = ("system", "model", "protocol", "at once", "requests/s", "p50 ms", "p99 ms", "p99.9 ms", "CPU µs/request", "failed")


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are also aligned as plain text: those of numbers to the right."""
    columns = [[header, *cells] for header, cells in zip(headers, zip(*rows, strict=True), strict=True)] if rows else []
    aligned = [_aligned(column) for column in columns]
    return "\n".join("| " + " | ".join(line) + " |" for line in zip(*aligned, strict=True))


def _aligned(column: Sequence[str]) -> list[str]:
    """The cells of a column and, below its header, the rule, all of one width."""
    width = max(map(len, column))
    if all(cell[:1].isdigit() or not cell for cell in column[1:]):
        header, *cells = (cell.rjust(width) for cell in column)
        return [header, "-" * (width - 1) + ":", *cells]
    header, *cells = (cell.ljust(width) for cell in column)
    return [header, "-" * width, *cells]


def measurement_row(measurement: Measurement) -> list[str]:
    """One line of `measurement_table`."""
    case, load = measurement.case, measurement.load
    at_once = f"{case.per_s:.0f}/s due" if case.per_s else str(case.concurrency)
    latencies = [f"{value:.2f}" for value in (load.p50_ms, load.p99_ms, load.p999_ms)]
    return [
        case.system,
        case.model,
        case.protocol,
        at_once,
        f"{load.per_s:.0f}",
        *latencies,
        cpu(measurement),
        str(load.n_failed),
    ]


def cpu(measurement: Measurement) -> str:
    """The sum, and its parts if there are several: ``83 = 33 + 33 + 17``, in the order of `measurement.cpu_us`."""
    total = f"{measurement.total_cpu_us:.0f}"
    if len(measurement.cpu_us) < 2:
        return total
    return f"{total} = {' + '.join(f'{value:.0f}' for value in measurement.cpu_us.values())}"


def measurement_table(measurements: Sequence[Measurement]) -> str:
    """A line for each, and below what the parts of the CPU column are."""
    stages = {each.case.system: " + ".join(each.cpu_us) for each in measurements if len(each.cpu_us) > 1}
    legend = "; ".join(f"{system}: {parts}" for system, parts in stages.items())
    text = table(_HEADERS, [measurement_row(measurement) for measurement in measurements])
    return f"{text}\n\nCPU by stage: {legend}." if legend else text


def memory_table(pss_mb: Mapping[str, Mapping[str, float]], peak_mb: Mapping[str, Mapping[str, float]]) -> str:
    """By system and stage; see `System.pss_mb` and `System.peak_rss_mb`."""
    rows = [
        [system, stage, f"{pss_mb[system][stage]:.0f}", f"{peak_mb[system][stage]:.0f}"]
        for system, stages in pss_mb.items()
        for stage in stages
    ]
    return table(("system", "stage", "PSS after load, MB", "peak RSS, MB"), rows)


def write(name: str, machine: Machine, sections: Mapping[str, str], data: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write ``<name>.md`` and ``<name>.json``; return the former.

    Args:
        name: of the files.
        machine: what was measured on.
        sections: Markdown by heading.
        data: the same, for programs.
        folder: where to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join([f"# {name}", str(machine), *(f"## {heading}\n\n{content}" for heading, content in sections.items())])
    path = folder / f"{name}.md"
    path.write_text(text + "\n")
    document = msgspec.json.format(msgspec.json.encode({"machine": machine, **data}), indent=1)
    path.with_suffix(".json").write_bytes(document + b"\n")
    return path
