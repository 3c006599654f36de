"""The meaning of a preprocessor's features beyond their shape: the name of each column, the category behind each number.

Two preprocessors with features of the same shape are not interchangeable if the meaning differs. Reads the attributes of
scikit-learn's fitted estimators without importing it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import msgspec

_VOCABULARIES = ("categories_", "vocabulary_", "classes_")
"""Fitted attributes that map numbers to categories: of encoders, vectorisers and binarisers."""


class Meaning(msgspec.Struct, frozen=True):
    """Names of the feature columns in order, empty if unknown, and the vocabularies in the steps' order.

    Without names, the vocabularies are preceded by the layout: which input columns each part of the transforms uses.
    """

    feature_names: tuple[str, ...]
    vocabularies: tuple[tuple[str, ...], ...]

    @property
    def fingerprint(self) -> str:
        """A digest of names and vocabularies; "" if both are empty."""
        if not self.feature_names and not self.vocabularies:
            return ""
        return "sha256:" + hashlib.sha256(msgspec.json.encode(self)).hexdigest()


NO_MEANING = Meaning((), ())


def meaning_of(transformer: Any) -> Meaning:
    """The meaning of a fitted transformer's features."""
    names = _feature_names(transformer)
    layout = () if names else tuple(_layout(transformer))
    return Meaning(names, (*layout, *_vocabularies(transformer)))


def _feature_names(transformer: Any) -> tuple[str, ...]:
    try:
        return tuple(str(name) for name in transformer.get_feature_names_out())
    except Exception:  # transformers without feature names raise various errors
        return ()


def _layout(transformer: Any) -> Iterator[tuple[str, ...]]:
    """The parts whose features are concatenated, in order, each with its input columns."""
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
    """One vocabulary, or one for each column, as text; a dict's ordered by its values."""
    if isinstance(value, dict):
        yield tuple(str(word) for word, _ in sorted(value.items(), key=lambda item: item[1]))
    elif isinstance(value, list | tuple):
        for column in value:
            yield tuple(map(str, column))
    else:
        yield tuple(map(str, value))


def parts(transformer: Any) -> list[Any]:
    """The fitted transformers of a Pipeline, ColumnTransformer or FeatureUnion; empty for others."""
    for attribute in ("steps", "transformers_", "transformer_list"):
        if entries := getattr(transformer, attribute, None):
            return [entry[1] for entry in entries]
    return []
