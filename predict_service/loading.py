"""The store of predictors, built from the settings."""

from __future__ import annotations

from functools import partial

from predict_service.settings import PredictSettings
from splitserve.repository.signing import signed_by
from splitserve.repository.sources import source_of
from splitserve.runtimes import predictor
from splitserve.runtimes.predictor import Predictor
from splitserve.server.store import VersionStore


def predictor_store(config: PredictSettings) -> VersionStore[Predictor]:
    """An empty store; its ``refresh`` loads."""
    load = partial(
        predictor.load,
        intra_op_num_threads=config.intra_op_num_threads or config.n_cores,
        providers=config.provider_names,
    )
    return VersionStore(
        signed_by(
            config.model_signature_key,
            source_of(
                config.model_repository,
                cache=config.model_cache,
                timeout_s=config.model_fetch_timeout_s,
                selection=config.selection,
            ),
        ),
        "predict",
        load,
        selection=config.selection,
        unload_delay_s=config.unload_delay_s,
        withdrawal_grace_s=2 * config.withdrawal_grace_s,
        allow_unreleased_pairs=config.allow_unreleased_pairs,
        poll_interval_s=config.poll_interval_s,
    )
