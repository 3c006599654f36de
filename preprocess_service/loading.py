"""The store of preprocessors, built from the settings."""

from __future__ import annotations

from functools import partial

from preprocess_service.settings import PreprocessSettings
from splitserve.repository.signing import signed_by
from splitserve.repository.sources import source_of
from splitserve.runtimes import preprocessor
from splitserve.runtimes.preprocessor import Preprocessor
from splitserve.server.store import VersionStore


def preprocessor_store(config: PreprocessSettings) -> VersionStore[Preprocessor]:
    """An empty store; its ``refresh`` loads."""
    load = partial(
        preprocessor.load,
        trusted_modules=[name.strip() for name in config.trusted_modules.split(",") if name.strip()],
        allow_environment_mismatch=config.allow_environment_mismatch,
        runtime=config.runtime,
        allow_unsafe_pickle=config.allow_unsafe_pickle,
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
        "preprocess",
        load,
        selection=config.selection,
        unload_delay_s=config.unload_delay_s,
        withdrawal_grace_s=config.withdrawal_grace_s,
        allow_unreleased_pairs=config.allow_unreleased_pairs,
        poll_interval_s=config.poll_interval_s,
    )
