"""The same function over many items: in this process, in processes of this machine, or on a Ray cluster.

    with open_workers("local", 2) as over:
        for item, result in over(items, work):

Results come as they are done. Only a few items are on their way at a time, so items may carry bytes and come from a
stream. A worker ends with the process that started it, however that ends.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from importlib.util import find_spec
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait as wait_for
from typing import Any, Protocol, TypeVar

import pyarrow as pa

from stackllama.errors import DataError, RecipeError

Item = TypeVar("Item")
Result = TypeVar("Result")


class Over(Protocol):
    """Gives each item with what `work` makes of it, in the order in which they are done.

    `work` and the items must be picklable: a function of a module or a `functools.partial` of one, and plain data.
    Raises what `work` raises.
    """

    def __call__(self, items: Iterable[Item], work: Callable[[Item], Result]) -> Iterator[tuple[Item, Result]]:
        """As the class says."""


@contextmanager
def open_workers(engine: str, count: int) -> Iterator[Over]:
    """Workers on an engine ("local" or "ray"); with one local worker everything happens in this process.

    Raises DataError where a worker is killed; RecipeError where Ray is asked for and is not installed.
    """
    if engine == "ray":
        with _cluster(count) as over:
            yield over
    elif count == 1:
        yield _here
    else:
        with _processes(count) as over:
            yield over


def work_on(work: Callable[[Item], Result], item: Item) -> Result:
    """What a worker does with an item, without the collector of reference cycles: an item makes hundreds of thousands
    of records and next to no cycles, and looking through them again and again was measured to take a fifth of the time.
    """
    collected = gc.isenabled()
    gc.disable()
    try:
        return work(item)
    finally:
        if collected:
            gc.enable()


def _here(items: Iterable[Item], work: Callable[[Item], Result]) -> Iterator[tuple[Item, Result]]:
    for item in items:
        yield item, work_on(work, item)


_LEAN = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "67108864", "MALLOC_MMAP_THRESHOLD_": "67108864"}
"""Read by glibc when a worker starts, so that large blocks that it frees go back to the system; others ignore it. With
limits of 64 KB a build on two cores took a quarter longer, since every table was mapped anew.
"""


@contextmanager
def _processes(count: int) -> Iterator[Over]:
    for name, value in _LEAN.items():
        os.environ.setdefault(name, value)
    # Forking would copy the locks of threads that this process has; a fresh interpreter has none.
    pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_settle)

    def over(items: Iterable[Item], work: Callable[[Item], Result]) -> Iterator[tuple[Item, Result]]:
        pending: dict[Future[Result], Item] = {}
        for item in items:
            pending[pool.submit(work_on, work, item)] = item
            if len(pending) > count:
                yield from _done(pending)
        while pending:
            yield from _done(pending)

    try:
        yield over
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed, most likely because memory ran out; what is done is kept: give the same "
            "command again with fewer of them (--compute.threads)"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _done(pending: dict[Future[Result], Item]) -> Iterator[tuple[Item, Result]]:
    finished, _ = wait(pending, return_when=FIRST_COMPLETED)
    for future in finished:
        item = pending.pop(future)
        yield item, future.result()


def _settle() -> None:
    """What a new worker does first: Ctrl-C is for the parent, and where the parent dies it dies too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pa.set_memory_pool(pa.system_memory_pool())  # Arrow's own keeps what was freed
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="stackllama-parent", daemon=True).start()


@contextmanager
def _cluster(count: int) -> Iterator[Over]:
    if find_spec("ray") is None:
        raise RecipeError(
            "compute.engine = ray needs the package ray, which is not installed; pip install 'stackllama[ray]', or set "
            "compute.engine to local"
        )
    import ray as installed

    ray: Any = installed

    def over(items: Iterable[Item], work: Callable[[Item], Result]) -> Iterator[tuple[Item, Result]]:
        remote: Any = ray.remote(work_on)
        slots = int(ray.cluster_resources().get("CPU", 1)) + 1
        pending: dict[Any, Item] = {}
        rest = iter(items)
        while True:
            while len(pending) < slots and (item := next(rest, _NONE)) is not _NONE:
                pending[remote.remote(work, item)] = item
            if not pending:
                return
            for reference in ray.wait(list(pending), num_returns=1)[0]:
                try:
                    yield pending.pop(reference), ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from error

    begun = not ray.is_initialized()
    if begun:
        _connect(ray, count)
    try:
        yield over
    finally:
        if begun:
            ray.shutdown()


_NONE: Any = object()


def _connect(ray: Any, workers: int) -> None:
    """Join the cluster that RAY_ADDRESS names, or start one of this machine alone: on loopback, without a dashboard."""
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
    else:
        ray.init(address="local", num_cpus=workers, include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
