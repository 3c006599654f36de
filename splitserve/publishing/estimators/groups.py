"""Clusters and mixtures."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from scipy.special import digamma
from sklearn.mixture._gaussian_mixture import _compute_log_det_cholesky

from splitserve.publishing.estimators.form import Form, converts
from splitserve.publishing.estimators.neighbours import distances, nearest_centre, nearest_mean
from splitserve.publishing.graph import Value, concat


@converts("sklearn.MeanShift", "sklearn.AffinityPropagation")
class ClusterCentres(Form):
    @cached_property
    def predict(self) -> Value:
        return nearest_centre(self.x, self.estimator.cluster_centers_)

    @cached_property
    def transform(self) -> Value:
        return distances(self.x, self.estimator.cluster_centers_).sqrt()


@converts("sklearn.KMeans", "sklearn.MiniBatchKMeans")
class KMeans(ClusterCentres):
    @cached_property
    def predict(self) -> Value:
        return nearest_mean(self.x, self.estimator.cluster_centers_)


@converts("sklearn.BisectingKMeans")
class BisectingKMeans(ClusterCentres):
    @cached_property
    def predict(self) -> Value:
        return self._below(self.estimator._bisecting_tree).astype(np.int64)

    def _below(self, node: Any) -> Value:
        """(n_rows,) of the cluster, for rows that belong to this node of the tree."""
        if node.left is None:
            return self.graph.constant(np.array([node.label], np.int64))
        centres = np.vstack((node.left.center, node.right.center)) + getattr(self.estimator, "_X_mean", 0.0)
        is_left = nearest_mean(self.x, centres).equals(np.int64(0))
        return self.graph.op("Where", is_left, self._below(node.left), self._below(node.right), dtype=np.int64)


@converts("sklearn.Birch")
class Birch(Form):
    @cached_property
    def predict(self) -> Value:
        model = self.estimator
        groups = self.graph.constant(np.asarray(model.subcluster_labels_, np.int64))
        return groups.take(nearest_centre(self.x, model.subcluster_centers_), axis=0)

    @cached_property
    def transform(self) -> Value:
        return distances(self.x, self.estimator.subcluster_centers_).sqrt()


@converts("sklearn.GaussianMixture")
class GaussianMixture(Form):
    @cached_property
    def log_probabilities(self) -> Value:
        """(n_rows, n_components), weighted."""
        return self._gaussians() + self.log_weights()

    @cached_property
    def predict_proba(self) -> Value:
        return (self.log_probabilities - self.log_probabilities.log_sum_exp()).exp()

    @cached_property
    def predict(self) -> Value:
        return self.log_probabilities.argmax()

    def log_weights(self) -> Any:
        return np.log(self.estimator.weights_).reshape(1, -1)

    def _gaussians(self) -> Value:
        model, columns = self.estimator, []
        n_features = model.means_.shape[1]
        for number, mean in enumerate(model.means_):
            roots = model.precisions_cholesky_ if model.covariance_type == "tied" else model.precisions_cholesky_[number]
            centred = self.wide - mean.reshape(1, -1)
            scaled = centred @ roots if np.ndim(roots) == 2 else centred * np.broadcast_to(roots, n_features).reshape(1, -1)
            columns.append((scaled * scaled).sum())
        determinants = _compute_log_det_cholesky(model.precisions_cholesky_, model.covariance_type, n_features)
        offset = np.broadcast_to(determinants, len(columns)) - 0.5 * n_features * np.log(2 * np.pi)
        return -0.5 * concat(columns) + offset.reshape(1, -1)


@converts("sklearn.BayesianGaussianMixture")
class BayesianGaussianMixture(GaussianMixture):
    def log_weights(self) -> Any:
        model = self.estimator
        n_features = model.means_.shape[1]
        spread = n_features * np.log(2.0) + digamma(0.5 * (model.degrees_of_freedom_ - np.arange(n_features)[:, np.newaxis])).sum(
            axis=0
        )
        more = 0.5 * (spread - n_features / model.mean_precision_) - 0.5 * n_features * np.log(model.degrees_of_freedom_)
        return (np.asarray(model._estimate_log_weights()) + more).reshape(1, -1)
