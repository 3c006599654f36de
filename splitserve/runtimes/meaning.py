"""What a preprocessor's results mean beyond their shape: which column is which, which number stands for which category.

Two preprocessors with results of the same shape can still not stand in for each other if this differs. Reads the attributes that
scikit-learn's fitted estimators have; imports nothing of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import msgspec

_VOCABULARIES = ("categories_", "vocabulary_", "classes_")
"""Fitted attributes that say which number stands for what: of encoders, of vectorisers, of binarisers."""


class Meaning(msgspec.Struct, frozen=True):
    """Names of the result's columns in order, none where the transforms cannot tell; the vocabularies in the steps' order.

    Where there are no names, which of its inputs go into which part of the transforms stands before the vocabularies.
    """

    feature_names: tuple[str, ...]
    vocabularies: tuple[tuple[str, ...], ...]

    @property
    def fingerprint(self) -> str:
        """A digest of everything; "" when there is nothing to tell."""
        if not self.feature_names and not self.vocabularies:
            return ""
        return "sha256:" + hashlib.sha256(msgspec.json.encode(self)).hexdigest()


NO_MEANING = Meaning((), ())


def meaning_of(transformer: Any) -> Meaning:
    """The meaning of a fitted transformer's results."""
    names = _feature_names(transformer)
    layout = () if names else tuple(_layout(transformer))
    return Meaning(names, (*layout, *_vocabularies(transformer)))


def _feature_names(transformer: Any) -> tuple[str, ...]:
    try:
        return tuple(str(name) for name in transformer.get_feature_names_out())
    except Exception:  # not every transformer can tell, and each says so in its own way
        return ()


def _layout(transformer: Any) -> Iterator[tuple[str, ...]]:
    """The parts whose results stand side by side, in order, each with the columns that it takes."""
    for name, _, columns in getattr(transformer, "transformers_", ()):
        if isinstance(columns, str | int | slice):
            yield name, str(columns)
        else:
            yield name, *map(str, columns)
    for name, _ in getattr(transformer, "transformer_list", ()):
        yield (name,)
    for part in parts(transformer):
        yield from _layout(part)


def _vocabularies(transformer: Any) -> Iterator[tuple[str, ...]]:
    for attribute in _VOCABULARIES:
        value = getattr(transformer, attribute, None)
        if value is not None:
            yield from _words(value)
    for part in parts(transformer):
        yield from _vocabularies(part)


def _words(value: Any) -> Iterator[tuple[str, ...]]:
    """One vocabulary, or one for each column, as text; a dict's in the order of its numbers."""
    if isinstance(value, dict):
        yield tuple(str(word) for word, _ in sorted(value.items(), key=lambda item: item[1]))
    elif isinstance(value, list | tuple):
        for column in value:
            yield tuple(map(str, column))
    else:
        yield tuple(map(str, value))


def parts(transformer: Any) -> list[Any]:
    """The fitted transformers inside of a Pipeline, ColumnTransformer or FeatureUnion."""
    for attribute in ("steps", "transformers_", "transformer_list"):
        if entries := getattr(transformer, attribute, None):
            return [entry[1] for entry in entries]
    return []
