"""Whether a preprocessor and a predictor make a pair: what the one puts out is what the other takes in, and means the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from splitserve.repository.manifest import Manifest, Postprocess
from splitserve.signature import TensorSpec, fits
from splitserve.tensors import Tensor

FINGERPRINT = "fingerprint"
"""The property of a predictor's metadata that says what it was trained on."""

FEATURE_NAMES = "feature_names"
"""The property that names the columns that it was trained on, as a JSON list, where there are no more than `MAX_NAMES`."""

MAX_NAMES = 1000

PROBABILITIES, LABEL = "probabilities", "label"
"""The outputs of the postprocess step."""


def misfits(preprocessor: Manifest, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> list[str]:
    """What keeps a preprocessor from being paired with a predictor of this signature; empty when they fit.

    Args:
        preprocessor: its manifest.
        inputs: the predictor's.
        outputs: the predictor's; the postprocess step, if there is one, must be able to take them.
    """
    found = fits(sent_specs(preprocessor), inputs)
    if preprocessor.postprocess is not None:
        found += postprocess_misfits(preprocessor.postprocess, preprocessor.labels, outputs)
    return found


def sent_specs(preprocessor: Manifest) -> tuple[TensorSpec, ...]:
    """The preprocessor's outputs under the names that the predictor has for them."""
    return tuple(
        TensorSpec(preprocessor.names.get(spec.name, spec.name), spec.datatype, spec.shape) for spec in preprocessor.outputs
    )


def sent(preprocessor: Manifest, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What the preprocessor put out, under the names that the predictor has for it."""
    names = preprocessor.names
    if not names:
        return tuple(outputs)
    return tuple(msgspec.structs.replace(tensor, name=names.get(tensor.name, tensor.name)) for tensor in outputs)


def postprocess_misfits(step: Postprocess, labels: Sequence[str], outputs: Sequence[TensorSpec]) -> list[str]:
    """What keeps the postprocess step from being applied to a predictor's outputs; empty when nothing does."""
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
    """Why the preprocessor's results do not mean what a predictor was trained on; "" when they do, or nobody can tell.

    Args:
        preprocessor: its manifest.
        fingerprint: what the predictor was trained on; "" if it does not say.
        feature_names: the columns that it was trained on, if known: then the first that differs is named.
    """
    if not fingerprint or not preprocessor.fingerprint or fingerprint == preprocessor.fingerprint:
        return ""
    mine = preprocessor.feature_names
    for index, (have, want) in enumerate(zip(mine, feature_names, strict=False)):
        if have != want:
            return f'feature {index}: expected "{want}", which the predictor was trained on, got "{have}"'
    return (
        f"fingerprint of the features: expected {_short(fingerprint)}, which the predictor was trained on, "
        f"got {_short(preprocessor.fingerprint)}"
    )


def told_meaning(predictor: Manifest) -> dict[str, str]:
    """What a predictor's metadata tells of the features that it was trained on."""
    facts = {}
    if predictor.fingerprint:
        facts[FINGERPRINT] = predictor.fingerprint
    if 0 < len(predictor.feature_names) <= MAX_NAMES:
        facts[FEATURE_NAMES] = msgspec.json.encode(predictor.feature_names).decode()
    return facts


def heard_meaning(properties: Mapping[str, str]) -> tuple[str, tuple[str, ...]]:
    """The fingerprint and the names of the features in a predictor's metadata, whoever's it is; both empty if it has none."""
    try:
        names = msgspec.json.decode(properties.get(FEATURE_NAMES, "[]"), type=tuple[str, ...])
    except msgspec.DecodeError:
        names = ()
    return properties.get(FINGERPRINT, ""), names


def _short(fingerprint: str) -> str:
    return fingerprint.removeprefix("sha256:")[:12]
