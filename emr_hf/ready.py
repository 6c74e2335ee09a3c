"""Weights of several tasks at a time: a switch to one that is ready costs next to nothing."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any

from torch import Tensor

Weights = Mapping[str, Tensor]


class ReadyTasks:
    """The last few tasks' weights, made when they are first asked for, or ahead of that.

    Args:
        make: fills given tensors with a task's weights, and returns them; new ones where it is given `None`.
        capacity: how many tasks' weights to hold.

    Attributes:
        capacity: see above.
    """

    def __init__(self, make: Callable[[str, Weights | None], Weights], capacity: int):
        self._make, self.capacity = make, capacity
        self._weights: OrderedDict[str, Weights] = OrderedDict()  # the last used, which is the model's now, last
        self._coming: dict[str, Future[None]] = {}
        self._in_the_making = 0
        self._lock = Lock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="emr-prefetch")

    def get(self, task: str) -> Weights:
        """A task's weights, from now on the ones in use."""
        with self._lock:
            coming = self._coming.pop(task, None)
        if coming is not None:
            coming.result()
        with self._lock:
            if task not in self._weights:
                self._weights[task] = self._make(task, self._room())
            self._weights.move_to_end(task)
            return self._weights[task]

    def put(self, task: str, weights: Weights) -> None:
        """Take in weights that are there already, the ones in use."""
        self._weights[task] = weights

    def prefetch(self, task: str) -> None:
        """Make a task's weights in the background."""
        with self._lock:
            if task not in self._weights and task not in self._coming:
                self._coming[task] = self._pool.submit(self._bring, task)

    def _bring(self, task: str) -> None:
        with self._lock:
            if task in self._weights:
                return
            room = self._room()
            self._in_the_making += 1
        try:
            weights = self._make(task, room)
        finally:
            with self._lock:
                self._in_the_making -= 1
        with self._lock:
            in_use = next(reversed(self._weights), None)
            self._weights[task] = weights
            if in_use is not None:
                self._weights.move_to_end(in_use)

    def _room(self) -> Weights | None:
        """The tensors of the task that was used least recently, where there must be no more of them."""
        if len(self._weights) + self._in_the_making < self.capacity:
            return None
        return self._weights.popitem(last=False)[1]

    def clear(self) -> None:
        """Let go of all of them; what is in the making is waited for."""
        for task in [*self._coming]:
            self._coming.pop(task).result()
        self._weights.clear()

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of a model starts without."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()
