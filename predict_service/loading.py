"""The store of predictors that the settings ask for."""

from __future__ import annotations

from functools import partial

from predict_service.settings import PredictSettings
from splitserve.repository import Repository
from splitserve.runtimes import predictor
from splitserve.runtimes.predictor import Predictor
from splitserve.server.store import VersionStore
from splitserve.signing import signed_by


def predictor_store(config: PredictSettings) -> VersionStore[Predictor]:
    """Nothing is loaded yet; the store's ``refresh`` does that."""
    load = partial(
        predictor.load,
        intra_op_num_threads=config.intra_op_num_threads,
        providers=[name.strip() for name in config.providers.split(",")],
    )
    return VersionStore(
        signed_by(config.model_signature_key, Repository(config.model_repository)),
        "predict",
        load,
        selection=config.selection,
        unload_delay_s=config.unload_delay_s,
    )
