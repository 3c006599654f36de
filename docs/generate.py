"""Write the documents that the code holds: settings, errors, log events, metrics, the manifest's schema, the rules for
versions and of the wire, and the tables of estimators and of options.

``python docs/generate.py`` writes them; ``--check`` writes nothing and exits 1 if the committed ones differ.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

import msgspec
from pydantic_core import PydanticUndefined

from docs import estimators
from docs.log_events import events
from jobs_service.settings import JobsSettings
from predict_service.settings import PredictSettings
from preprocess_service.settings import PreprocessSettings
from proxy.settings import ProxySettings
from splitserve.errors import TABLE
from splitserve.publishing.boosting.options import OPTIONS
from splitserve.repository.environment import PORTABLE_RULES, RULES
from splitserve.repository.manifest import Manifest
from splitserve.runtimes.plans.encoders import Numbers, Words
from splitserve.runtimes.plans.files import OPERATIONS
from splitserve.runtimes.plans.operations import EXACT_UFUNCS, ROUNDED_UFUNCS
from splitserve.server.settings import ServiceSettings, variable_name
from splitserve.telemetry.families import FAMILIES
from splitserve.telemetry.recorders import LATENCY_BOUNDS, SIZE_BOUNDS
from tests.wire import test_rfc7541, test_rfc9113, test_rfc9113_client
from tests.wire.rules import Shown, markdown

DOCS = Path(__file__).parent
LIBRARY_NAMES = {"xgboost": "XGBoost", "lightgbm": "LightGBM", "catboost": "CatBoost"}
SERVICES: dict[str, type[ServiceSettings]] = {
    "proxy": ProxySettings,
    "preprocess": PreprocessSettings,
    "predict": PredictSettings,
    "jobs": JobsSettings,
}


def settings_page() -> str:
    """docs/settings.md"""
    lines = [
        "# Settings",
        "",
        "Each service reads environment variables when it starts. A wrong value stops it, with status 2, before it listens.",
        "`splitserve up` passes its environment to the services, except hosts, ports and targets, which are its options. Written",
        "from the settings classes by `make docs`.",
    ]
    for service, settings in SERVICES.items():
        lines += ["", f"## {service}", "", "| variable | default | meaning |", "|---|---|---|"]
        for name, field in settings.model_fields.items():
            default = "" if field.default is PydanticUndefined or field.default == "" else f"`{_shown(field.default)}`"
            meaning = " ".join((field.description or "").split())
            lines.append(f"| `{variable_name(settings, name)}` | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def errors_page() -> str:
    """docs/errors.md"""
    lines = [
        "# Errors",
        "",
        "One table for both faces. Over gRPC the status details hold a `google.rpc.ErrorInfo` with `reason`, domain",
        "`splitserve`, and metadata `stage`, `model` and `pair`; over REST the same stand next to `error`. `stage` names",
        "the service that failed, however many hops away. Written from `splitserve/errors.py` by `make docs`.",
        "",
        "| reason | gRPC | HTTP | a retry helps | raised when |",
        "|---|---|---|---|---|",
    ]
    for error in TABLE:
        retry = "yes" if error.is_retryable else "no"
        meaning = " ".join((error.__doc__ or "").split())
        lines.append(f"| `{error.reason}` | {error.grpc_code} | {error.http_status} | {retry} | {meaning} |")
    return "\n".join(lines) + "\n"


def metrics_page() -> str:
    """docs/metrics.md"""
    lines = [
        "# Metrics",
        "",
        "What `GET /metrics` of a service's admin listener shows ([telemetry.md](telemetry.md)), as Prometheus text, or as",
        "OpenMetrics if the scraper asks for it. With several workers, gauges have a label `worker`, and the rest is their sum.",
        "Written from `splitserve/telemetry/families.py` by `make docs`.",
        "",
        "| metric | type | unit | labels | meaning |",
        "|---|---|---|---|---|",
    ]
    for family in FAMILIES:
        labels = ", ".join(f"`{label}`" for label in family.labels)
        lines.append(f"| `{family.name}` | {family.kind} | {family.unit} | {labels} | {family.meaning} |")
    for title, bounds in (("Durations", LATENCY_BOUNDS), ("Rows and requests of a call", SIZE_BOUNDS)):
        shown = ", ".join(f"{bound:g}" for bound in bounds)
        lines += ["", f"Bounds of buckets. {title}: {shown}."]
    return "\n".join(lines) + "\n"


def logs_page() -> str:
    """docs/logs.md"""
    lines = [
        "# Log events",
        "",
        "A service writes one line per event to standard output, as JSON unless it is a terminal (`LOG_FORMAT`). `event` is a",
        "constant term. Every line also has `level`, `timestamp` and `service`; `worker` if a service has several; and, within",
        "a request with credentials, `caller`. Lines of libraries have `logger`. Lines never contain tensors, bodies, headers or",
        "tokens.",
        "Written from the code by `make docs`.",
        "",
        "| event | level | fields | written by | meaning |",
        "|---|---|---|---|---|",
    ]
    for name, group in groupby(events(), key=lambda event: event[:3]):
        found = list(group)
        event, level, fields = name
        modules = ", ".join(f"`{module}`" for module in dict.fromkeys(one.module for one in found))
        meaning = " ".join(dict.fromkeys(one.meaning for one in found if one.meaning))
        shown = ", ".join(f"`{field}`" for field in fields)
        lines.append(f"| `{event}` | {level} | {shown} | {modules} | {meaning} |")
    return "\n".join(lines) + "\n"


def manifest_schema() -> str:
    """docs/manifest.schema.json"""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **msgspec.json.schema(Manifest)}
    return msgspec.json.format(msgspec.json.encode(schema), indent=2).decode() + "\n"


def _filled(page: str, what: str, lines: Iterable[str]) -> str:
    """A document with these lines between its marks, ``<!-- WHAT: written by make docs -->`` and ``<!-- end of WHAT -->``."""
    begin, end = f"<!-- {what}: written by make docs -->", f"<!-- end of {what} -->"
    before, rest = (DOCS / page).read_text().split(begin)
    return "\n".join([before + begin, *lines, end + rest.split(end)[1]])


def versions_page() -> str:
    """docs/versions.md, with the rules that `splitserve.repository.environment` has put between its marks."""
    rows = ["| bundle | package | the version here must be | otherwise |", "|---|---|---|---|"]
    for kind, rules in RULES.items():
        for rule in rules:
            rows.append(f"| {kind} | {rule.package} | {rule.meaning} | {'refused' if rule.is_required else 'a warning'} |")
    for rule in PORTABLE_RULES:
        rows.append(f"| preprocess, portable | {rule.package} | {rule.meaning} | its transforms are loaded, by the rules above |")
    rows.append("| preprocess, portable | the plan's format, operations | one that the service has | refused |")
    rows.append("| predict | ONNX IR, opset of each domain | a version that the ONNX Runtime here supports | refused |")
    return _filled("versions.md", "rules", rows)


def plan_format_page() -> str:
    """docs/plan-format.md, with the operations between its marks."""
    rows = ["| operation | version | class | fields | what it computes |", "|---|---|---|---|---|"]
    for name, operation in sorted(OPERATIONS.items()):
        own = [field for field in operation.__struct_fields__ if field not in ("version", "of")]
        meaning = " ".join((operation.__doc__ or "").split()).replace("``", "`").replace("|", "\\|")
        fields = ", ".join(f"`{field}`" for field in own)
        rows.append(f"| `{name}` | {operation.VERSION} | {'exact' if operation.IS_EXACT else 'rounded'} | {fields} | {meaning} |")
    rows += ["", f"`ufunc`: {', '.join(EXACT_UFUNCS)}. `rounded_ufunc`: {', '.join(ROUNDED_UFUNCS)}.", ""]
    for table in (Words, Numbers):
        meaning = " ".join((table.__doc__ or "").split()).replace("``", "`")
        rows.append(
            f"A table of `{'look_up` and `one_hot' if table is Words else 'look_up_numbers` and `one_hot_numbers'}`: {meaning}"
        )
    return _filled("plan-format.md", "operations", rows)


def publishing_page() -> str:
    """docs/publishing.md, with the table of estimators between its marks."""
    return _filled("publishing.md", "estimators", estimators.table())


def boosting_page() -> str:
    """docs/boosting.md, with the tables of options between its marks."""
    lines = []
    for library, options in groupby(OPTIONS, key=lambda option: option.library):
        lines += ["", f"### {LIBRARY_NAMES[library]}", "", "| choice | published | use instead |", "|---|---|---|"]
        for option in options:
            lines.append(f"| `{option.choice}` | {'equal' if option.is_equal else 'refused'} | {option.instead} |")
    return _filled("boosting.md", "options", [*lines, ""])


def wire_page() -> str:
    """docs/wire.md, with the rules that its tests have put between its marks."""
    tables: dict[str, Sequence[Shown]] = {
        "HTTP/2, server (RFC 9113)": test_rfc9113.RULES,
        "HTTP/2, client (RFC 9113)": test_rfc9113_client.RULES,
        "HPACK (RFC 7541)": test_rfc7541.RULES,
    }
    lines = []
    for title, rules in tables.items():
        lines += ["", f"### {title}", "", *markdown(rules)]
    return _filled("wire.md", "rules", [*lines, ""])


def main() -> None:
    pages = {
        "settings.md": settings_page(),
        "errors.md": errors_page(),
        "logs.md": logs_page(),
        "metrics.md": metrics_page(),
        "manifest.schema.json": manifest_schema(),
        "versions.md": versions_page(),
        "plan-format.md": plan_format_page(),
        "wire.md": wire_page(),
        "publishing.md": publishing_page(),
        "boosting.md": boosting_page(),
    }
    if "--check" in sys.argv[1:]:
        stale = [name for name, text in pages.items() if not (DOCS / name).exists() or (DOCS / name).read_text() != text]
        if stale:
            raise SystemExit(f"stale documents: {', '.join(stale)}; run `make docs`")
        return
    for name, text in pages.items():
        (DOCS / name).write_text(text)


if __name__ == "__main__":
    main()
