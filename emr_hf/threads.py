"""Work spread over threads: what is spread leaves Python to itself, in torch or in the compiled loops."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def run_all(jobs: Iterable[Callable[[], T]], threads: int) -> Iterator[T]:
    """Run jobs, a few ahead of what is asked for; their results in order.

    Args:
        jobs: taken one by one, in the caller's thread.
        threads: how many to run at a time; 1 is the caller's own.

    Raises:
        Exception: what a job raises, once those that were running have ended.
    """
    if threads <= 1:
        for job in jobs:
            yield job()
        return
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for job in jobs:
                waiting.append(pool.submit(job))
                if len(waiting) > 4 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
