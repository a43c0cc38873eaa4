"""Who makes the processes that share a task: ``--engine`` and ``--address``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tokenreduce.bench.workers import PoolMaker

__all__ = ["Address", "Engine", "pool_maker"]

ENGINES = ("processes", "ray")

Engine = Annotated[
    str,
    typer.Option(help="Who shares the work: processes of this machine, or ray (Ray Data, on several as well)."),
]
Address = Annotated[
    str | None,
    typer.Option(help="The Ray cluster, auto or ray://HOST:PORT; one is started here where none is given."),
]


def pool_maker(engine: str, address: str | None, workers: int, option: str = "--workers") -> PoolMaker:
    """What makes the processes, as many as ``option`` says. Raises ``ValueError`` for another engine, or options that
    do not go together."""
    if engine not in ENGINES:
        raise ValueError(f"--engine is {' or '.join(ENGINES)}, not {engine!r}")
    if engine == "processes":
        if address is not None:
            raise ValueError("--address is of a Ray cluster; give --engine ray with it")
        from tokenreduce.bench.workers import Workers

        return Workers
    if workers < 2:
        raise ValueError(f"--engine ray runs {option} actors; give 2 or more (one process needs no engine)")
    import importlib.util
    from functools import partial

    if importlib.util.find_spec("ray") is None:
        raise ImportError("Ray is not installed: pip install 'tokenreduce[ray]'")
    from tokenreduce.integrations.ray_data import RayPool

    return partial(RayPool, address=address)
