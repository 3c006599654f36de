"""A tracer for tests of one process: its spans are kept in a list."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from splitserve.telemetry.traces import FinishedSpan, Sampler, Span, Tracer, Tracing

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, NOT_SAMPLED = f"00-{TRACE}-{CALLER}-01", f"00-{TRACE}-{CALLER}-00"


class Recorded(list[FinishedSpan]):
    """Spans that have ended."""

    @property
    def spans(self) -> list[Span]:
        return [finished.span for finished in self]

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]


@contextmanager
def tracing(sampler: Sampler | None = None) -> Iterator[Recorded]:
    """Trace what this process does in the block."""
    recorded = Recorded()
    Tracing.tracer = Tracer(sampler or Sampler(), recorded.append)
    try:
        yield recorded
    finally:
        Tracing.tracer = None
