"""Whether a preprocessor and a predictor make a pair: signatures fit, and the features mean what the predictor was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from splitserve.repository.manifest import Manifest, Postprocess
from splitserve.signature import TensorSpec, fits
from splitserve.tensors import Tensor

FINGERPRINT = "fingerprint"
"""The property of a predictor's metadata with the fingerprint of the features that it was trained on."""

FEATURE_NAMES = "feature_names"
"""The property with the names of these features as a JSON list, if there are at most `MAX_NAMES`."""

MAX_NAMES = 1000

PROBABILITIES, LABEL = "probabilities", "label"
"""The outputs of the postprocess step."""


def misfits(preprocessor: Manifest, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> list[str]:
    """Why a preprocessor cannot be paired with a predictor of this signature; empty if it can.

    Args:
        preprocessor: its manifest.
        inputs: the predictor's.
        outputs: the predictor's; the postprocess step, if there is one, must accept them.
    """
    found = fits(sent_specs(preprocessor), inputs)
    if preprocessor.postprocess is not None:
        found += postprocess_misfits(preprocessor.postprocess, preprocessor.labels, outputs)
    return found


def sent_specs(preprocessor: Manifest) -> tuple[TensorSpec, ...]:
    """The preprocessor's output specs under the predictor's input names."""
    return tuple(
        TensorSpec(preprocessor.names.get(spec.name, spec.name), spec.datatype, spec.shape) for spec in preprocessor.outputs
    )


def sent(preprocessor: Manifest, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The preprocessor's output tensors under the predictor's input names."""
    names = preprocessor.names
    if not names:
        return tuple(outputs)
    return tuple(msgspec.structs.replace(tensor, name=names.get(tensor.name, tensor.name)) for tensor in outputs)


def postprocess_misfits(step: Postprocess, labels: Sequence[str], outputs: Sequence[TensorSpec]) -> list[str]:
    """Why the postprocess step cannot be applied to a predictor's outputs; empty if it can."""
    scores = next((spec for spec in outputs if spec.name == step.scores), None)
    if scores is None:
        return [f'the postprocess step: expected a predictor output "{step.scores}", got none']
    if scores.datatype not in ("FP32", "FP64") or len(scores.shape) != 2:
        return [f'the postprocess step: expected "{step.scores}" as FP32 or FP64 (batch, n_labels), got {scores}']
    if scores.shape[1] != len(labels):
        return [f"the postprocess step: expected {len(labels)} scores a row, one for each label, got {scores.shape[1]}"]
    return [
        f'the postprocess step: makes "{spec.name}", which is an output of the predictor too'
        for spec in outputs
        if spec.name in (PROBABILITIES, LABEL) and spec is not scores
    ]


def other_meaning(preprocessor: Manifest, fingerprint: str, feature_names: Sequence[str] = ()) -> str:
    """How the preprocessor's features differ in meaning from those that a predictor was trained on; "" if equal or unknown.

    Args:
        preprocessor: its manifest.
        fingerprint: of the features that the predictor was trained on; "" if unknown.
        feature_names: their names, if known; then the first that differs is named.
    """
    if not fingerprint or not preprocessor.fingerprint or fingerprint == preprocessor.fingerprint:
        return ""
    for index, (have, want) in enumerate(zip(preprocessor.feature_names, feature_names, strict=False)):
        if have != want:
            return f'feature {index}: expected "{want}", which the predictor was trained on, got "{have}"'
    return (
        f"fingerprint of the features: expected {_short(fingerprint)}, which the predictor was trained on, "
        f"got {_short(preprocessor.fingerprint)}"
    )


def meaning_properties(predictor: Manifest) -> dict[str, str]:
    """The properties of a predictor's metadata about the features that it was trained on."""
    facts = {}
    if predictor.fingerprint:
        facts[FINGERPRINT] = predictor.fingerprint
    if 0 < len(predictor.feature_names) <= MAX_NAMES:
        facts[FEATURE_NAMES] = msgspec.json.encode(predictor.feature_names).decode()
    return facts


def meaning_from_properties(properties: Mapping[str, str]) -> tuple[str, tuple[str, ...]]:
    """Fingerprint and feature names from a predictor's metadata, third-party servers included; both empty if it has none."""
    try:
        names = msgspec.json.decode(properties.get(FEATURE_NAMES, "[]"), type=tuple[str, ...])
    except msgspec.DecodeError:
        names = ()
    return properties.get(FINGERPRINT, ""), names


def _short(fingerprint: str) -> str:
    return fingerprint.removeprefix("sha256:")[:12]
