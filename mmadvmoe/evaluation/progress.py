"""How far a robust evaluation is, in the log."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Optional

from mmengine.dist import get_world_size
from mmengine.logging import print_log

from .outcomes import CLEAN, RobustOutcomes

# Seconds between two messages: an attack on a chunk takes from milliseconds to hours.
_INTERVAL = 10.0


class EvaluationProgress:
    """Logs images done, robust accuracy so far and time left, every few seconds and at the end.

    Of several processes the first one logs, and what it says is about its own share of the images.

    Args:
        names: The names of the attacks.
        num_images: Images of this process.
        num_chunks: Chunks of this process.
        clock: Where the time comes from, in seconds.
    """

    def __init__(
        self, names: Sequence[str], num_images: int, num_chunks: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._names = (CLEAN, *names)
        self._num_images = num_images
        self._num_chunks = num_chunks
        self._clock = clock
        self._last = clock()
        self._chunks = dict.fromkeys(self._names, 0)
        self._seconds: dict[str, list[float]] = {name: [] for name in self._names}
        self._done = self._robust = 0

    def report(self, name: str, outcomes: RobustOutcomes, seconds: Optional[float]) -> None:
        """Take note of the outcome of one chunk under one attack, and log if it is time.

        Args:
            name: Of the attack.
            outcomes: Those of the chunk so far.
            seconds: How long the attack took; None where its outcome was on disk.
        """
        self._chunks[name] += 1
        if seconds is not None:
            self._seconds[name].append(seconds)
        standing = int((outcomes.worst().prediction == outcomes.label).sum())
        size = len(outcomes.label)
        if name == self._names[-1]:
            self._done += size
            self._robust += standing
        finished = self._done == self._num_images
        if finished or self._clock() - self._last >= _INTERVAL:
            self._last = self._clock()
            print_log(self._message(name, standing, size), logger='current')

    def seconds_left(self) -> Optional[float]:
        """Estimated from the attacks on the chunks done; None while some attack has never run."""
        left = 0.0
        for name, seconds in self._seconds.items():
            chunks = self._num_chunks - self._chunks[name]
            if chunks and not seconds:
                return None
            left += chunks * sum(seconds) / max(len(seconds), 1)
        return left

    def _message(self, name: str, standing: int, size: int) -> str:
        share = f' of process 0 of {get_world_size()}' if get_world_size() > 1 else ''
        parts = [f'Robust evaluation: {self._done} of {self._num_images} images{share}']
        if self._done:
            parts.append(f'robust accuracy so far {100 * self._robust / self._done:.2f}')
        if name != self._names[-1]:
            parts.append(f'in the next {size} images {standing} stand after {name!r}')
        left = self.seconds_left()
        if left:
            parts.append(f'{timedelta(seconds=round(left))} left')
        return ', '.join(parts)
