"""Limits of messages and requests. Every face checks requests before it looks up the model.

The codecs limit the rank of tensors (`splitserve.tensors`); the number of elements is limited by the size of the message.
"""

from __future__ import annotations

import re
from itertools import accumulate

import msgspec

from splitserve.errors import InvalidInput, NotFound, TooLarge
from splitserve.oip.messages import InferRequest
from splitserve.tensors import Tensor, n_elements
from splitserve.versions import MODEL_NAME, unknown_model

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""The largest message that is sent or received unless settings say otherwise."""


def message_too_large(what: str, n_rows: int, n_bytes: int, *, stage: str, max_bytes: int) -> TooLarge:
    """The error of a message that would exceed the limit of a stage, found before it is made.

    Args:
        what: the message, e.g. ``"the answer"``.
        n_rows: of the request.
        n_bytes: that the message has at least.
        stage: whose limit it is; the setting is named after it.
        max_bytes: the limit.
    """
    return TooLarge(
        f"{what} would have at least {n_bytes} bytes for {n_rows} rows, the limit is {max_bytes} "
        f"({stage.upper()}_MAX_MESSAGE_BYTES); send fewer rows in a request"
    )


MAX_NAME_LENGTH = 128
"""Characters of a model's name; longer names cannot be published."""


class RequestLimits(msgspec.Struct, frozen=True):
    """Limits of one request. ``max_element_bytes`` limits an element of a BYTES tensor."""

    max_inputs: int = 64
    max_outputs: int = 64
    max_parameters: int = 64
    max_rows: int = 1_048_576
    max_element_bytes: int = 1024 * 1024

    def check(self, request: InferRequest) -> None:
        """Raises:
        InvalidInput: too many inputs, outputs or parameters, or a name that no model can have.
        TooLarge: too many rows, or an element that is too large.
        """
        if len(request.model) > MAX_NAME_LENGTH:
            raise InvalidInput(f"the model name has {len(request.model)} characters, the limit is {MAX_NAME_LENGTH}")
        inputs = request.inputs
        if len(inputs) > self.max_inputs or request.outputs or request.parameters:
            self._check_counts(request)
        for tensor in inputs:
            if tensor.shape and tensor.shape[0] > self.max_rows:
                n_elements(f'input "{tensor.name[:64]}"', tensor.shape)  # malformed if no tensor can have that many elements
                raise TooLarge(f'input "{tensor.name[:64]}" has {tensor.shape[0]} rows, the limit is {self.max_rows} (max_rows)')
            if tensor.datatype == "BYTES" and len(tensor.raw) > self.max_element_bytes + 4:
                self._check_elements(tensor)

    def _check_counts(self, request: InferRequest) -> None:
        n_parameters = len(request.parameters) + sum([len(output.parameters) for output in request.outputs])
        _check_count("inputs", len(request.inputs), self.max_inputs, "max_inputs")
        _check_count("requested outputs", len(request.outputs), self.max_outputs, "max_outputs")
        _check_count("parameters", n_parameters, self.max_parameters, "max_parameters")

    def _check_elements(self, tensor: Tensor) -> None:
        """Checks lengths only; whether the bytes match the shape is checked with the signature."""
        raw, offset = tensor.raw, 0
        while offset < len(raw):
            length = int.from_bytes(raw[offset : offset + 4], "little")
            if length > self.max_element_bytes:
                raise TooLarge(
                    f'input "{tensor.name[:64]}": an element has {length} bytes, the limit is {self.max_element_bytes} '
                    "(max_element_bytes)"
                )
            offset += 4 + length


def _check_count(what: str, count: int, limit: int, setting: str) -> None:
    if count > limit:
        raise InvalidInput(f"the request has {count} {what}, the limit is {limit} ({setting})")


def check_model_name(name: str) -> None:
    """Raises:
    NotFound: no model can have this name.
    """
    if not MODEL_NAME.fullmatch(name):
        raise NotFound(unknown_model(name))


MAX_JSON_DEPTH = 64
"""Nesting of lists and objects. A tensor has at most 16 dimensions, three levels below the top."""

_STRINGS = re.compile(rb'"[^"]*"')
_BRACKETS = bytes.maketrans(b"{}", b"[]")
_NO_STRUCTURE = bytes(set(range(256)) - set(b'[]{}"'))
_STEPS = bytes.maketrans(b'[]"', b"\x01\xff\x00")


def check_json_depth(body: bytes, what: str = "the request body") -> None:
    """Raises:
    InvalidInput: the JSON is nested deeper than `MAX_JSON_DEPTH`. Malformed JSON is left to the parser.

    A body with fewer brackets than that passes at once. Otherwise only brackets and quotes are kept; strings are removed, first
    those without brackets, which are adjacent quotes; then the innermost brackets, which are most of them; the rest is summed
    up, 1 for an opening bracket and -1 for a closing one.
    """
    if body.count(b"[") + body.count(b"{") <= MAX_JSON_DEPTH:
        return
    if b"\\" in body:
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    left = body.translate(_BRACKETS, _NO_STRUCTURE).replace(b'""', b"")
    left = _STRINGS.sub(b"", left).replace(b"[]", b"")
    steps = memoryview(left.translate(_STEPS)).cast("b")
    if b"[" * MAX_JSON_DEPTH in left or max(accumulate(steps), default=0) >= MAX_JSON_DEPTH:
        raise InvalidInput(f"{what} is nested deeper than {MAX_JSON_DEPTH} levels")
