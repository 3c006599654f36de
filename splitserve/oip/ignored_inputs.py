"""Inputs that a model accepts and does not use: columns of its training data that no transform selects.

They are not in the signature. The model's metadata lists them, so that clients that know it need not send them; those of other
clients are removed before a request is checked. An input that is neither in the signature nor listed is an error.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from splitserve.oip.messages import InferRequest, ModelMetadata

IGNORED_INPUTS = "ignored_inputs"
"""The property of a model's metadata with their names, a JSON list."""


def encode_ignored(names: Sequence[str]) -> str:
    """The property; "" if there are none."""
    return msgspec.json.encode(names).decode() if names else ""


def ignored_inputs(metadata: ModelMetadata) -> frozenset[str]:
    """The names in the property."""
    text = metadata.properties.get(IGNORED_INPUTS)
    try:
        return frozenset(msgspec.json.decode(text, type=list[str])) if text else frozenset()
    except msgspec.DecodeError:  # another maker's property of that name
        return frozenset()


def without_ignored(request: InferRequest, ignored: Collection[str]) -> InferRequest:
    """The request without these inputs, whatever they hold."""
    if not ignored or all(tensor.name not in ignored for tensor in request.inputs):
        return request
    kept = tuple(tensor for tensor in request.inputs if tensor.name not in ignored)
    return msgspec.structs.replace(request, inputs=kept)
