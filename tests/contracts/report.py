"""Writes docs/conformance.md from a run of the tests: ``python -m tests.contracts.report``, or ``make conformance``.

A test says with the mark ``line`` which lines of the checklist it is about; a line has passed if all of its tests have.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

PAGE = Path("docs/conformance.md")

SECTIONS: dict[str, dict[str, str]] = {
    "REST": {
        "R-01": "`GET /v2/health/live`",
        "R-02": "`GET /v2/health/ready`",
        "R-03": "`GET /v2`: name, version, extensions",
        "R-04": "`GET /v2/models/{m}[/versions/{v}]`: signature, the batch as -1",
        "R-05": "`GET /v2/models/{m}[/versions/{v}]/ready`; 404 unknown, 503 not ready",
        "R-06": "`POST /v2/models/{m}[/versions/{v}]/infer`",
        "R-07": "405 with `Allow` for other methods; HEAD as GET",
        "R-08": "404 in the protocol's form for unknown paths",
        "R-09": "`GET /v2/models`",
        "1.1": "no outputs, or an empty list of them, requests all",
        "1.1 504": "deadline exceeded is 504",
        "I-01": "nested and flat data",
        "I-02": "ragged, too few, too many elements",
        "I-03": "nesting that contradicts the shape",
        "I-04": "a dimension that is negative, a fraction, text, null or beyond int64",
        "I-05": "no rows",
        "I-06": "scalars",
        "I-07": "a shape whose product overflows",
        "I-08": "unknown datatypes",
        "I-09": "another datatype than the model's",
        "I-10": "FP16 and BF16 in JSON",
        "I-11": "numbers beyond the datatype",
        "I-12": "fractions in integers",
        "I-13": "booleans in numbers, text and numbers in BOOL",
        "I-14": "text in numbers",
        "I-15": "BYTES as JSON strings",
        "I-16": "numbers in BYTES",
        "I-17": "BYTES outputs that are not UTF-8",
        "I-18": "lone surrogates",
        "I-19": "missing, unknown, repeated inputs",
        "I-20": "unknown outputs",
        "I-21": "an output requested twice",
        "I-22": "only requested outputs, in that order",
        "I-23": "`id` a number, null, empty",
        "I-24": "parameters that are not scalars",
        "I-25": "bodies that are not a JSON object in UTF-8",
        "I-26": "repeated JSON keys",
        "I-27": "deep nesting",
        "I-28": "64-bit integers, exactly",
        "I-29": "how FP32 is printed",
        "I-30": "unknown fields",
        "I-31": "gzip and deflate, both ways, bounded",
        "I-32": "`Expect: 100-continue`, chunked bodies",
    },
    "Binary tensors": {
        "B-01": "the header splits JSON from tensors",
        "B-02": "binary and JSON inputs together",
        "B-03": "binary and JSON outputs together",
        "B-04": "`binary_data_output` and its exceptions",
        "B-05": "a header over pure JSON",
        "B-06": "raw bodies: length 0",
        "B-07": "lengths that are negative, too large, not a number, repeated",
        "B-08": "sizes that do not add up",
        "B-09": "size in addition to data, size that contradicts the shape",
        "B-10": "empty outputs",
        "B-11": "the length counts bytes before compression",
        "B-12": "413 for bodies above the limit",
    },
    "gRPC": {
        "G-01": "the six methods of the standard",
        "G-02": "raw and typed contents",
        "G-03": "both at once",
        "G-04": "different numbers of raw contents and inputs",
        "G-05": "raw contents too short, too long, empty",
        "G-06": "typed contents of the wrong number or field",
        "G-07": "typed contents beyond the datatype",
        "G-08": "FP16 and BF16 raw only",
        "G-09": "negative dimensions, products that overflow",
        "G-10": "BYTES: lengths, counts, bytes that are not UTF-8",
        "G-11": "no inputs, no name, unknown model",
        "G-12": "requested outputs",
        "G-13": "`model_version`",
        "G-14": "bytes that are not a message",
        "G-15": "messages above grpc's 4 MiB, and above the limit",
        "G-16": "deadlines and `timeout`",
        "G-17": "unknown fields",
        "G-18": "grpc.health.v1",
        "G-19": "reflection, v1 and v1alpha",
        "G-20": "compressed messages",
        "G-21": "any metadata, keepalive",
        "2 unknown method": "UNIMPLEMENTED for unsupported methods",
        "2 proto clash": "our messages and those of other clients in one process",
    },
    "Extensions": {
        "1.3 model_configuration": "`/config`, `ModelConfig`",
        "1.3 statistics": "`/stats`, `ModelStatistics`",
        "1.3 model_repository": "index, load, unload; the latter two if enabled",
        "1.3 schedule_policy": "`timeout`, `priority`, `Request-Timeout`",
        "1.3 classification": "the top classes of an output",
        "1.3 ModelStreamInfer": "many requests on one stream; an error is a message",
        "1.3": "parameters of extensions that are malformed",
    },
    "Decisions": {
        "D1": "health is in the body and in the status",
        "D2": "not ready is 503",
        "D3": '`{"error": …}` as `application/json` with every status',
        "D4": "a caller's mistake is 400, never 422 or 5xx",
        "D5": "answers over gRPC are raw",
        "D6": "`id` is echoed or absent",
        "D7": "absent fields are omitted, never null",
        "D8": "`model_version` is the one used",
        "D9": "`ModelReady` of an unknown model is not an error",
        "D10": "`Request for unknown model`",
        "D11": "non-finite numbers are null and counted",
        "D12": "NaN and infinities in JSON, null for them",
        "D13": "the content type does not matter",
        "D14": "unknown versions are 404, never ignored",
        "D15": "reserved and unknown parameters are ignored",
        "D16": "double, uint64 and empty parameters",
        "D17": "KServe's field for the model to load",
        "D18": "Triton's message for streams",
        "D19": "`properties` of metadata as in the standard",
        "D20": "`/v2` and `/v2/`",
    },
    "V1, OpenAPI": {
        "3": "V1: predict by row and by column, status, errors",
        "6.4": "schemathesis against the OpenAPI document",
    },
    "Third-party programs": {
        "6.3 tritonclient": "tritonclient 2.73, http and grpc",
        "6.3 tritonclient.aio": "tritonclient 2.73, asyncio, with streams",
        "6.3 grpc tools": "a client by reflection, health probes",
        "6.3 open-inference": "open-inference-openapi and open-inference-grpc 2.0, made from the protocol's documents",
        "6.3 kserve": "KServe 0.21's REST and gRPC clients",
        "6.3 each stage": "tritonclient's gRPC client, a client by reflection and probes at preprocess and at predict",
        "6.3 mlserver infer": "`mlserver infer` 1.7.1 over REST; it does not support gRPC yet",
        "6.3 perf_analyzer": "perf_analyzer 2.60: closed loop, rate, batches, own data, text; REST, gRPC, streams",
    },
}

_AT_STAGES = {
    **SECTIONS["gRPC"],
    "I-08": SECTIONS["REST"]["I-08"],
    "I-09": SECTIONS["REST"]["I-09"],
    "I-13": SECTIONS["REST"]["I-13"],
    "D9": SECTIONS["Decisions"]["D9"],
    "1.3": "configuration, statistics, classification, streams",
}
_IN_THE_FACE = ("G-17", "G-19", "G-21", "2 proto clash")
"""Implemented once for all stages, and tested at the proxy."""

SECTIONS["gRPC at preprocess and at predict"] = {
    f"stage {line}": what for line, what in _AT_STAGES.items() if line not in _IN_THE_FACE
}
SECTIONS["Interoperation"] = {
    "6.3 predict of others": "MLServer 1.7.1 and KServe 0.21's server instead of predict",
    "kserve manifests": "`deploy/kserve` by the models of KServe 0.21's client",
}

DIFFERENT = {
    "I-03": "refused: nested data must be nested according to the shape",
    "I-05": "answered, with no rows",
    "I-09": "a narrower datatype that converts without loss is accepted for a wider one, and (n,) for (n, 1)",
    "I-12": "refused, except for integral values like 1.0, which some clients write",
    "I-26": "the last one is used, as in most parsers",
    "I-29": "as the double that it converts to, as other servers print it",
    "1.3 schedule_policy": "`priority` decides which requests are refused under overload, not the order",
    "stage I-09": "predict converts nothing; preprocess accepts narrower numbers as the proxy does",
    "stage G-10": "bytes that are not UTF-8 are refused where they reach ONNX, whose strings are UTF-8",
    "D5": "always: no known client needs typed answers",
    "D12": "null is NaN for FP32 and FP64, and an empty string for BYTES",
}  # fmt: skip
"""Where the behaviour differs from most servers, or from what one could expect, and why."""

FAILED, SKIPPED, PASSED = "failed", "not run", "passed"


def results(report: Path) -> dict[str, list[str]]:
    """The states of each line's tests, from a JUnit report; for those that did not run, the reason."""
    found: dict[str, list[str]] = defaultdict(list)
    for test in ET.parse(report).iter("testcase"):
        failed = test.find("failure") is not None or test.find("error") is not None
        skipped = test.find("skipped")
        state = FAILED if failed else PASSED if skipped is None else f"{SKIPPED}: {skipped.get('message', '')}"
        for entry in test.iterfind("properties/property[@name='line']"):
            found[entry.get("value", "")].append(state)
    return found


def page(found: dict[str, list[str]]) -> str:
    """docs/conformance.md"""
    text = [
        "# Conformance",
        "",
        "The Open Inference Protocol V2 over REST and gRPC, Triton's extensions and the V1 form, line by line, and third-party",
        "clients. Written by `make conformance` from a run of the tests in `tests/contracts` and `tests/clients`, which specify",
        "each line in full. Not supported: sequences, shared memory, control of tracing and logging.",
    ]
    for title, lines in SECTIONS.items():
        text += ["", f"## {title}", "", "| line | what | tests | result | different |", "|---|---|--:|---|---|"]
        for line, what in lines.items():
            states = found.get(line, [])
            verdict = next((state for state in (FAILED, PASSED) if state in states), states[0] if states else SKIPPED)
            text.append(f"| {line} | {what} | {len(states)} | {verdict} | {DIFFERENT.get(line, '')} |")
    return "\n".join(text) + "\n"


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-n", "0", "-m", "line", "-o", "junit_family=xunit1", f"--junitxml={report}"]
        status = subprocess.run([*command, "tests/contracts", "tests/clients"]).returncode
        found = results(report)
    unknown = found.keys() - {line for lines in SECTIONS.values() for line in lines}
    if unknown:
        raise SystemExit(f"tests are marked with lines that the page does not have: {', '.join(sorted(unknown))}")
    PAGE.write_text(page(found))
    raise SystemExit(status)


if __name__ == "__main__":
    main()
