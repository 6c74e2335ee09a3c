"""Signs of life among the processes that share a merge.

Each process counts up in the store of their process group, from a thread. One that computes, downloads or waits for a
slow disk for hours goes on counting; one that is stopped, hangs with its machine or is out of reach does not.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

# Seconds between two signs of life, at most and while not all have given one; and what the last one may take.
_INTERVAL, _MEETING_INTERVAL, _TO_END = 5.0, 0.05, 2.0

_LEFT = 1 << 62


class Heartbeats:
    """This process' signs of life, and how long the others have shown none.

    Only the thread that speaks to the store ever waits for it: where the process that keeps the store hangs, a call
    never returns.

    Args:
        store: that of the default process group.
        rank, size: this process, and how many there are.
        bound: seconds after which one that shows no life is given up.
    """

    def __init__(self, store: Store, rank: int, size: int, bound: float):
        self._rank, self.bound = rank, bound
        self._interval = min(bound / 10, _INTERVAL)
        self._counts = [0] * size
        self._silence = [0.0] * size
        self._unanswered = 0.0
        self._ending = threading.Event()
        self._leaving = False
        self._speaking = threading.Thread(target=self._speak, args=(store,), daemon=True)
        self._speaking.start()
        threading.Thread(target=self._judge, daemon=True).start()

    @property
    def absent(self) -> list[int]:
        """The processes that have shown no life yet."""
        return [rank for rank, count in enumerate(self._counts) if count == 0]

    @property
    def left(self) -> list[int]:
        """The processes that have given the merge up."""
        return [rank for rank, count in enumerate(self._counts) if count < 0]

    def silent(self, part: float = 1.0) -> list[int]:
        """The processes that have shown no life for a part of the bound; 0 if the store does not answer either."""
        if self._unanswered > part * self.bound:
            return [0]
        return [rank for rank, seconds in enumerate(self._silence) if seconds > part * self.bound]

    def end(self, leaving: bool) -> None:
        """Give no more signs of life.

        Args:
            leaving: whether the others may still be waiting for this process, which are told then.
        """
        self._leaving = leaving
        self._ending.set()
        self._speaking.join(_TO_END)

    def _speak(self, store: Store) -> None:
        with suppress(RuntimeError):  # without a store all are silent
            from torch.distributed import PrefixStore

            own = store.clone()  # type: ignore[attr-defined]  # a connection that no other call holds up
            merge = own.add(f"emr_hf/{self._rank}", 1)  # several may follow each other in one process group
            counts = PrefixStore(f"emr_hf/{merge}", own)
            while True:
                counts.add(str(self._rank), 1)
                self._counts = [counts.add(str(rank), 0) for rank in range(len(self._counts))]
                if self._ending.wait(_MEETING_INTERVAL if self.absent else self._interval):
                    break
            if self._leaving:
                counts.add(str(self._rank), -_LEFT)

    def _judge(self) -> None:
        known, before = self._counts, time.monotonic()
        while not self._ending.wait(self._interval):
            # No more than it should be: while this process was stopped itself, no other was silent.
            passed, before = min(time.monotonic() - before, 2 * self._interval), time.monotonic()
            if (counts := self._counts) is known:
                self._unanswered += passed
                continue
            quiet = [count == old != 0 for count, old in zip(counts, known)]
            self._silence = [seconds + passed if same else 0.0 for seconds, same in zip(self._silence, quiet)]
            self._unanswered, known = 0.0, counts
