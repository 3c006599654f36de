"""The postprocess step: scores into probabilities and a label."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.arrays import DTYPES, from_array, to_array
from splitserve.repository.manifest import Postprocess
from splitserve.repository.pairing import postprocess_misfits as differences
from splitserve.runtimes.postprocess import apply, output_specs
from splitserve.signature import TensorSpec, check_outputs
from splitserve.tensors import Tensor, decode_bytes

LABELS = ("cat", "dog", "é")
STEP = Postprocess("scores")
SCORES = TensorSpec("scores", "FP32", ("batch", 3))
MORE = TensorSpec("embedding", "FP32", ("batch", 2))


def scores(values: object, datatype: str = "FP32") -> Tensor:
    return from_array("scores", np.array(values, dtype=DTYPES[datatype]).reshape(-1, 3))


@pytest.mark.parametrize("datatype", ["FP32", "FP64"])
def test_scores_become_probabilities_and_the_best_label(datatype):
    """Softmax along the labels, in the scores' own datatype; the label is UTF-8 text."""
    values = [[0.0, np.log(2.0), np.log(5.0)], [5.0, 5.0, -1000.0]]

    probabilities, label = apply(STEP, LABELS, [scores(values, datatype)])

    assert (probabilities.name, probabilities.datatype, probabilities.shape) == ("probabilities", datatype, (2, 3))
    np.testing.assert_allclose(to_array(probabilities), [[1 / 8, 2 / 8, 5 / 8], [0.5, 0.5, 0.0]], rtol=1e-6)
    assert (label.name, label.datatype, label.shape) == ("label", "BYTES", (2,))
    assert decode_bytes(label) == ["é".encode(), b"cat"]


def test_without_an_activation_scores_are_the_probabilities():
    """Bit for bit; the label is still made."""
    sent = scores([[0.25, 0.5, 0.25]])

    probabilities, label = apply(Postprocess("scores", "none"), LABELS, [sent])

    assert probabilities.raw == sent.raw
    assert decode_bytes(label) == [b"dog"]


@given(st.lists(st.tuples(*[st.floats(-(2.0**126), 2.0**126, width=32)] * 3), max_size=10))
def test_probabilities_are_between_0_and_1_and_add_up(values):
    """However large the scores are: nothing overflows."""
    array = to_array(scores(values))

    probabilities, label = (to_array(tensor) for tensor in apply(STEP, LABELS, [scores(values)]))

    assert ((probabilities >= 0) & (probabilities <= 1)).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    assert label.tolist() == [LABELS[best].encode() for best in array.argmax(axis=1)]


def test_a_score_of_minus_infinity_is_a_probability_of_0():
    """Models mask labels so."""
    probabilities, label = apply(STEP, LABELS, [scores([[-np.inf, 2.0, 2.0]])])

    assert to_array(probabilities).tolist() == [[0.0, 0.5, 0.5]]
    assert decode_bytes(label) == [b"dog"]


def test_no_rows_are_answered_with_no_rows():
    """The shapes are those of the signature."""
    answer = apply(STEP, LABELS, [scores([])])

    assert [tensor.shape for tensor in answer] == [(0, 3), (0,)]


def test_other_outputs_pass_through_after_the_computed_ones():
    """Untouched, in their order."""
    before, after = from_array("a", np.zeros((1, 2))), from_array("b", np.ones((1, 2)))

    answer = apply(STEP, LABELS, [before, scores([[1, 2, 3]]), after])

    assert [tensor.name for tensor in answer] == ["probabilities", "label", "a", "b"]
    assert answer[2:] == (before, after)


@pytest.mark.parametrize("outputs", [[SCORES], [MORE, SCORES], [SCORES, MORE]])
@pytest.mark.parametrize("n_rows", [0, 1, 4])
def test_the_answer_matches_the_signature(outputs, n_rows):
    """What is promised for a predictor is what `apply` gives for it."""
    specs = output_specs(STEP, outputs)
    sent = [from_array(spec.name, np.ones((n_rows, spec.shape[1]), dtype="f4")) for spec in outputs]

    answer = apply(STEP, LABELS, sent)

    assert differences(STEP, LABELS, outputs) == []
    assert [tensor.name for tensor in answer] == [spec.name for spec in specs]
    check_outputs(specs, answer, n_rows)


def test_the_signature_replaces_the_scores():
    """By probabilities of their form and one label a row."""
    assert output_specs(STEP, [MORE, SCORES]) == (
        TensorSpec("probabilities", "FP32", ("batch", 3)),
        TensorSpec("label", "BYTES", ("batch",)),
        MORE,
    )


@pytest.mark.parametrize(
    ("outputs", "difference"),
    [
        ([], 'the postprocess step: expected a predictor output "scores", got none'),
        ([MORE], 'the postprocess step: expected a predictor output "scores", got none'),
        (
            [TensorSpec("scores", "INT64", ("batch", 3))],
            "the postprocess step: expected \"scores\" as FP32 or FP64 (batch, n_labels), got INT64 ['batch', 3]",
        ),
        (
            [TensorSpec("scores", "FP16", ("batch", 3))],
            "the postprocess step: expected \"scores\" as FP32 or FP64 (batch, n_labels), got FP16 ['batch', 3]",
        ),
        (
            [TensorSpec("scores", "FP32", ("batch",))],
            "the postprocess step: expected \"scores\" as FP32 or FP64 (batch, n_labels), got FP32 ['batch']",
        ),
        (
            [TensorSpec("scores", "FP32", ("batch", 4))],
            "the postprocess step: expected 3 scores a row, one for each label, got 4",
        ),
        (
            [TensorSpec("scores", "FP32", ("batch", 2))],
            "the postprocess step: expected 3 scores a row, one for each label, got 2",
        ),
        (
            [TensorSpec("scores", "FP32", ("batch", "n"))],
            "the postprocess step: expected 3 scores a row, one for each label, got n",
        ),
    ],
)
def test_a_predictor_that_the_postprocess_step_does_not_fit_is_refused(outputs, difference):
    """Before the pair is live, not with its first request."""
    assert differences(STEP, LABELS, outputs) == [difference]


def test_scores_may_have_the_name_of_an_output():
    """They are replaced, so the name is free."""
    step = Postprocess("probabilities", "none")
    outputs = [TensorSpec("probabilities", "FP32", ("batch", 3))]

    assert differences(step, LABELS, outputs) == []
    assert [spec.name for spec in output_specs(step, outputs)] == ["probabilities", "label"]


def test_scores_of_either_precision_fit():
    """Those that `apply` computes in."""
    for datatype in ("FP32", "FP64"):
        assert differences(STEP, LABELS, [TensorSpec("scores", datatype, ("batch", 3))]) == []


@pytest.mark.parametrize("name", ["label", "probabilities"])
def test_an_output_with_the_name_of_a_computed_one_is_refused(name):
    """An answer cannot have two tensors of one name: one would take the other's place."""
    outputs = [SCORES, TensorSpec(name, "INT64", ("batch",))]

    (difference,) = differences(STEP, LABELS, outputs)

    assert f'"{name}"' in difference
