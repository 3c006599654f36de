"""The corpus of the fuzzer, and what hypothesis makes of it: every decoder gives a request or one of our errors."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.decoders import DECODERS

CORPUS = Path(__file__).parent / "corpus"
SEEDS = {name: [path.read_bytes() for path in sorted((CORPUS / name).iterdir())] for name in DECODERS}


@pytest.mark.parametrize("name", DECODERS)
def test_what_was_found_once_stays_harmless(name: str) -> None:
    """Inputs that are kept, among them those that once did harm."""
    assert SEEDS[name]
    for data in SEEDS[name]:
        DECODERS[name](data)


@pytest.mark.parametrize("name", DECODERS)
@given(data=st.data())
def test_a_changed_input_is_harmless(name: str, data: st.DataObject) -> None:
    """A good input with some bytes exchanged, taken out or put in."""
    good = data.draw(st.sampled_from(SEEDS[name]))
    start = data.draw(st.integers(0, len(good)))
    end = data.draw(st.integers(start, min(len(good), start + 8)))

    DECODERS[name](good[:start] + data.draw(st.binary(max_size=8)) + good[end:])
