"""Naive Bayes: joint log likelihoods of the classes, normalised."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from splitserve.publishing.estimators.form import Form, converts
from splitserve.publishing.graph import Value, concat


class NaiveBayes(Form):
    @cached_property
    def likelihood(self) -> Value:
        """(n_rows, n_classes), joint and logarithmic, in float64."""
        raise NotImplementedError

    @cached_property
    def predict_proba(self) -> Value:
        return (self.likelihood - self.likelihood.log_sum_exp()).exp()

    @cached_property
    def class_index(self) -> Value:
        return self.likelihood.argmax()


@converts("sklearn.GaussianNB")
class GaussianNB(NaiveBayes):
    @cached_property
    def likelihood(self) -> Value:
        model, columns = self.estimator, []
        for mean, variance, prior in zip(model.theta_, model.var_, model.class_prior_, strict=True):
            distance = self.wide - mean.reshape(1, -1)
            columns.append(-0.5 * ((distance * distance) / variance.reshape(1, -1)).sum())
            columns[-1] += np.log(prior) - 0.5 * np.log(2.0 * np.pi * variance).sum()
        return concat(columns)


@converts("sklearn.MultinomialNB")
class MultinomialNB(NaiveBayes):
    @cached_property
    def likelihood(self) -> Value:
        return self.wide @ self.estimator.feature_log_prob_.T + self.estimator.class_log_prior_.reshape(1, -1)


@converts("sklearn.ComplementNB")
class ComplementNB(NaiveBayes):
    @cached_property
    def likelihood(self) -> Value:
        model = self.estimator
        found = self.wide @ model.feature_log_prob_.T
        return found + model.class_log_prior_.reshape(1, -1) if len(model.classes_) == 1 else found


@converts("sklearn.BernoulliNB")
class BernoulliNB(NaiveBayes):
    @cached_property
    def likelihood(self) -> Value:
        model = self.estimator
        x = self.wide if model.binarize is None else (self.wide > float(model.binarize)).astype(np.float64)
        absent = np.log(1 - np.exp(model.feature_log_prob_))
        return x @ (model.feature_log_prob_ - absent).T + (model.class_log_prior_ + absent.sum(axis=1)).reshape(1, -1)


@converts("sklearn.CategoricalNB")
class CategoricalNB(NaiveBayes):
    @cached_property
    def likelihood(self) -> Value:
        total, indices = None, self.x.astype(np.int64)
        for column, table in enumerate(self.estimator.feature_log_prob_):
            found = self.graph.constant(table.T, np.float64).take(indices.take(column), axis=0)
            total = found if total is None else total + found
        assert total is not None, "there is at least one feature"
        return total + self.estimator.class_log_prior_.reshape(1, -1)
