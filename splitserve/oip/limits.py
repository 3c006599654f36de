"""How large a request may be, beyond what its bytes bound already. Checked by every face, before anything is looked up.

Rank and nesting of JSON are bounded by the codecs (`splitserve.tensors`, `splitserve.oip.rest`); how many elements a tensor has,
by the bytes that they come in.
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
"""Characters of a model's name; longer ones cannot be published."""


class RequestLimits(msgspec.Struct, frozen=True):
    """Of one request. ``max_element_bytes`` bounds an element of a BYTES tensor."""

    max_inputs: int = 64
    max_outputs: int = 64
    max_parameters: int = 64
    max_rows: int = 1_048_576
    max_element_bytes: int = 1024 * 1024

    def check(self, request: InferRequest) -> None:
        """Raises:
        InvalidInput: too many inputs, outputs or parameters, or a name that no model can have.
        TooLarge: too many rows, or too large an element.
        """
        if len(request.model) > MAX_NAME_LENGTH:
            raise InvalidInput(f"the model's name has more than {MAX_NAME_LENGTH} characters")
        inputs = request.inputs
        if len(inputs) > self.max_inputs or request.outputs or request.parameters:
            self._check_counts(request)
        for tensor in inputs:
            if tensor.shape and tensor.shape[0] > self.max_rows:
                n_elements(f'input "{tensor.name[:64]}"', tensor.shape)  # more than there can be is malformed
                raise TooLarge(f'input "{tensor.name[:64]}" has {tensor.shape[0]} rows, at most {self.max_rows} are taken')
            if tensor.datatype == "BYTES" and len(tensor.raw) > self.max_element_bytes + 4:
                self._check_elements(tensor)

    def _check_counts(self, request: InferRequest) -> None:
        n_parameters = len(request.parameters) + sum([len(output.parameters) for output in request.outputs])
        _check_count("inputs", len(request.inputs), self.max_inputs)
        _check_count("requested outputs", len(request.outputs), self.max_outputs)
        _check_count("parameters", n_parameters, self.max_parameters)

    def _check_elements(self, tensor: Tensor) -> None:
        """Their lengths only; whether the bytes are what the shape says is checked with the signature."""
        raw, offset = tensor.raw, 0
        while offset < len(raw):
            length = int.from_bytes(raw[offset : offset + 4], "little")
            if length > self.max_element_bytes:
                raise TooLarge(
                    f'input "{tensor.name[:64]}": an element has {length} bytes, at most {self.max_element_bytes} are taken'
                )
            offset += 4 + length


def _check_count(what: str, count: int, most: int) -> None:
    if count > most:
        raise InvalidInput(f"the request has {count} {what}, at most {most} are taken")


def check_model_name(name: str) -> None:
    """Raises:
    NotFound: no model can have this name, so none is looked for.
    """
    if not MODEL_NAME.fullmatch(name):
        raise NotFound(unknown_model(name))


MAX_JSON_DEPTH = 64
"""Lists and objects within each other. Tensors have at most 16 dimensions, and stand three levels deep."""

_STRINGS = re.compile(rb'"[^"]*"')
_BRACKETS = bytes.maketrans(b"{}", b"[]")
_NO_STRUCTURE = bytes(set(range(256)) - set(b'[]{}"'))
_STEPS = bytes.maketrans(b'[]"', b"\x01\xff\x00")


def check_json_depth(body: bytes) -> None:
    """Raises:
    InvalidInput: the JSON is nested more than `MAX_JSON_DEPTH` deep. Malformed JSON is left to the parser.

    What has fewer brackets than that is not looked at. Of the rest only brackets and quotes are kept; then strings go, first
    those without brackets in them, which are two quotes side by side; then the innermost brackets, which are most of them; and
    what is left is summed up, an opening one as 1 and a closing one as -1.
    """
    if body.count(b"[") + body.count(b"{") <= MAX_JSON_DEPTH:
        return
    if b"\\" in body:
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    left = body.translate(_BRACKETS, _NO_STRUCTURE).replace(b'""', b"")
    left = _STRINGS.sub(b"", left).replace(b"[]", b"")
    steps = memoryview(left.translate(_STEPS)).cast("b")
    if b"[" * MAX_JSON_DEPTH in left or max(accumulate(steps), default=0) >= MAX_JSON_DEPTH:
        raise InvalidInput(f"the request body is nested more than {MAX_JSON_DEPTH} deep")
