"""Engines by name. Their packages are imported when one is chosen."""

from __future__ import annotations

from splitserve.scoring.engines import Engine
from splitserve.scoring.errors import ScoringError, WrongUsage

ENGINES = ("local", "ray", "spark", "dask")


def check_engine(name: str) -> None:
    """Raises:
    WrongUsage: there is no such engine.
    """
    if name not in ENGINES:
        raise WrongUsage(f"--engine {name}: expected one of {', '.join(ENGINES)}")


def engine_of(name: str, n_workers: int) -> Engine:
    """The engine of a name. With one that runs on other machines ``n_workers`` counts only where it is started here.

    Raises:
        ScoringError: its package is not installed.
    """
    check_engine(name)
    try:
        if name == "ray":
            from splitserve.scoring.engines.on_ray import RayEngine

            return RayEngine(n_workers)
        if name == "spark":
            from splitserve.scoring.engines.on_spark import SparkEngine

            return SparkEngine(n_workers)
        if name == "dask":
            from splitserve.scoring.engines.on_dask import DaskEngine

            return DaskEngine(n_workers)
    except ModuleNotFoundError as error:
        raise ScoringError(
            f'--engine {name} needs more packages ({error.name}): pip install "splitserve[batch-{name}]"'
        ) from error
    from splitserve.scoring.engines.local import LocalEngine

    return LocalEngine(n_workers)
