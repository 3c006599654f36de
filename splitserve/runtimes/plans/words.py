"""Operations on documents: text is split into words or characters, which are counted."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from splitserve.arrays import Array
from splitserve.runtimes.plans.layouts import Layout, Operation, PlanError, Run, StepArrays, dtype_of, numbers, one, refuse

_TOKENS = {"(?u)\\b\\w\\w+\\b": re.compile(r"(?u)\b\w\w+\b"), "(?u)\\b\\w+\\b": re.compile(r"(?u)\b\w+\b")}
"""The patterns of words that plans know: any other could take forever on some text."""

TOKEN_PATTERNS = tuple(_TOKENS)
_MAX_N = 64
_SPACES = re.compile(r"\s\s+")

Analyser = Callable[[str], list[str]]


class Documents(Operation, frozen=True, tag="documents"):
    """The only column of text, as documents."""

    def bind(self, given: list[Layout], arrays: StepArrays) -> tuple[Run, Layout]:
        if one(given, "text").width != 1:
            raise PlanError("expected one column of text")
        return (lambda columns: columns[0]), Layout("documents")


class _Terms(Operation, frozen=True, kw_only=True):
    """How documents become terms: ``analyser`` "word" (those that ``token_pattern`` finds, without ``stop_words``), "char" or
    "char_wb" (characters, of words); from ``shortest`` to ``longest`` of them in a row; before that in lower case if
    ``lowercase``, without accents if ``strip_accents``.
    """

    analyser: Literal["word", "char", "char_wb"] = "word"
    token_pattern: str = TOKEN_PATTERNS[0]
    stop_words: tuple[str, ...] = ()
    shortest: int = 1
    longest: int = 1
    lowercase: bool = True
    strip_accents: Literal["", "ascii", "unicode"] = ""

    def terms(self) -> Analyser:
        """Raises:
        PlanError: the parameters are not those of plans.
        """
        if self.token_pattern not in _TOKENS:
            raise PlanError(f'unknown token_pattern "{self.token_pattern[:64]}"')
        if not 1 <= self.shortest <= self.longest <= _MAX_N:
            raise PlanError(f"expected 1 <= shortest <= longest <= {_MAX_N}")
        split = {"word": self._words, "char": self._characters, "char_wb": self._characters_of_words}[self.analyser]()
        lowercase, strip = self.lowercase, {"": None, "ascii": _ascii, "unicode": _without_accents}[self.strip_accents]

        def terms(document: Any) -> list[str]:
            if document is np.nan:
                refuse("np.nan is an invalid document, expected byte or unicode string.")
            if document is None:
                refuse("a document is missing")
            if lowercase:
                document = document.lower()
            if strip is not None:
                document = strip(document)
            return split(document)

        return terms

    def _words(self) -> Analyser:
        find, stop_words = _TOKENS[self.token_pattern].findall, frozenset(self.stop_words)
        shortest, longest = self.shortest, self.longest

        def words(document: str) -> list[str]:
            tokens = [word for word in find(document) if word not in stop_words] if stop_words else find(document)
            if longest == 1:
                return tokens
            return [
                " ".join(tokens[start : start + n])
                for n in range(shortest, min(longest, len(tokens)) + 1)
                for start in range(len(tokens) - n + 1)
            ]

        return words

    def _characters(self) -> Analyser:
        shortest, longest = self.shortest, self.longest

        def characters(document: str) -> list[str]:
            text = _SPACES.sub(" ", document)
            return [
                text[start : start + n]
                for n in range(shortest, min(longest, len(text)) + 1)
                for start in range(len(text) - n + 1)
            ]

        return characters

    def _characters_of_words(self) -> Analyser:
        shortest, longest = self.shortest, self.longest

        def characters(document: str) -> list[str]:
            found: list[str] = []
            for word in _SPACES.sub(" ", document).split():
                padded = f" {word} "
                for n in range(shortest, longest + 1):
                    found += [padded[start : start + n] for start in range(max(1, len(padded) - n + 1))]
                    if len(padded) <= n:  # a short word once
                        break
            return found

        return characters


def _without_accents(text: str) -> str:
    if text.isascii():
        return text
    return "".join(each for each in unicodedata.normalize("NFKD", text) if not unicodedata.combining(each))


def _ascii(text: str) -> str:
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode("ascii")


class CountWords(_Terms, frozen=True, kw_only=True, tag="count_words"):
    """Documents -> how often each term of the ``vocabulary`` is in them, or 1 if ``binary``, as ``dtype``."""

    vocabulary: tuple[str, ...]
    binary: bool = False
    dtype: str = "int64"

    def bind(self, given: list[Layout], arrays: StepArrays) -> tuple[Run, Layout]:
        one(given, "documents")
        terms, dtype, binary = self.terms(), dtype_of(self.dtype), self.binary
        place_of = {term: place for place, term in enumerate(self.vocabulary)}
        if len(place_of) != len(self.vocabulary):
            raise PlanError("expected a vocabulary of different terms")
        layout = numbers(dtype, len(place_of))

        def run(documents: list[Any]) -> Array:
            found = np.zeros((len(documents), len(place_of)), dtype)
            for row, document in zip(found, documents, strict=True):
                places = [place_of[term] for term in terms(document) if term in place_of]
                if binary:
                    row[places] = 1
                else:
                    np.add.at(row, places, dtype.type(1))
            return found

        return run, layout


class HashWords(_Terms, frozen=True, kw_only=True, tag="hash_words"):
    """Documents -> how often terms with each hash are in them, ``n_features`` hashes in all; with the sign of the hash if
    ``signed``; 1 if ``binary``, as ``dtype``. The hash is MurmurHash3, 32 bits, with seed 0.
    """

    n_features: int
    signed: bool = True
    binary: bool = False
    dtype: str = "float64"

    def bind(self, given: list[Layout], arrays: StepArrays) -> tuple[Run, Layout]:
        one(given, "documents")
        terms, layout = self.terms(), numbers(dtype_of(self.dtype), self.n_features)
        n_features, signed, binary, dtype = self.n_features, self.signed, self.binary, layout.dtype

        def run(documents: list[Any]) -> Array:
            found = np.zeros((len(documents), n_features), dtype)
            for row, document in zip(found, documents, strict=True):
                hashes = [_signed(murmurhash3(term.encode())) for term in terms(document)]
                places = [min(abs(each), 2**31 - 1 - (each == -(2**31)) * (n_features - 1)) % n_features for each in hashes]
                np.add.at(row, places, [-1 if signed and each < 0 else 1 for each in hashes])
                if binary:
                    row[places] = 1
            return found

        return run, layout


def _signed(value: int) -> int:
    return value - 2**32 if value >= 2**31 else value


_MASK = 0xFFFFFFFF


def murmurhash3(data: bytes) -> int:
    """MurmurHash3 of 32 bits, seed 0. Source: A. Appleby, smhasher, ``MurmurHash3_x86_32``."""
    state, whole = 0, len(data) & ~3
    for start in range(0, whole, 4):
        state ^= _mixed(int.from_bytes(data[start : start + 4], "little"))
        state = ((state << 13) | (state >> 19)) & _MASK
        state = (state * 5 + 0xE6546B64) & _MASK
    if whole < len(data):
        state ^= _mixed(int.from_bytes(data[whole:], "little"))
    state ^= len(data)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        state = ((state ^ (state >> shift)) * factor) & _MASK
    return state ^ (state >> 16)


def _mixed(value: int) -> int:
    value = (value * 0xCC9E2D51) & _MASK
    value = ((value << 15) | (value >> 17)) & _MASK
    return (value * 0x1B873593) & _MASK
