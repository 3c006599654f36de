"""The header Retry-After, for those who send requests. Source: RFC 9110, section 10.2.3."""

from __future__ import annotations

from email.utils import parsedate_to_datetime


def parse_retry_after(value: str, now: float) -> float | None:
    """The seconds of its number, or until its date; None: it is neither.

    Args:
        value: of the header.
        now: seconds since the epoch.
    """
    if value.isascii() and value.isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - now)
    except (ValueError, OverflowError):
        return None
