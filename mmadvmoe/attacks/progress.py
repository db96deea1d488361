"""How far a long attack is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Optional

from mmengine.logging import print_log
from tqdm import tqdm

# Seconds between two lines where there is no terminal, and before a bar is shown in one.
_INTERVAL, _DELAY = 60.0, 2.0


class PassProgress:
    """Shows which part of an attack runs, how many images still stand and how long it can take at most.

    In a terminal as a bar, elsewhere as a line of the log every minute.

    Args:
        model (Callable): Images to logits; :meth:`__call__` is it, and counts.
        parts (Mapping): Forward passes of each part of the attack on images that all stand.
        num_images (int): In the batch.
        name (str): Of the attack.
        terminal (bool, optional): Whether to draw a bar. Defaults to whether stderr is a terminal.
        clock (Callable): Seconds.
    """

    def __init__(
        self,
        model: Callable,
        parts: Mapping[str, int],
        num_images: int,
        name: str,
        terminal: Optional[bool] = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._parts = dict(parts)
        self._num_images = num_images
        self._name = name
        self._clock = clock
        self._robust = num_images
        self._done = 0
        self._part = ''
        self._in_part = 0
        self._started = self._last = clock()
        terminal = sys.stderr.isatty() if terminal is None else terminal
        self._bar = (
            tqdm(total=sum(self._parts.values()), desc=name, unit='pass', leave=False, delay=_DELAY)
            if terminal
            else None
        )

    def __call__(self, images: Any) -> Any:
        """Run the model, and count it."""
        self._in_part += 1
        if self._bar is not None:
            self._bar.update()
        elif self._clock() - self._last >= _INTERVAL:
            self._last = self._clock()
            print_log(self.message(), 'current')
        return self._model(images)

    def begin(self, part: str, robust: int) -> None:
        """A part begins, on ``robust`` images."""
        self._finish_part()
        self._part, self._robust = part, robust
        if self._bar is not None:
            self._bar.set_description(self._state())

    def close(self) -> None:
        """The attack is through."""
        if self._bar is not None:
            self._bar.close()

    def message(self) -> str:
        """One line."""
        passes = self._done + self._in_part
        planned = sum(self._parts.values())
        left = (self._clock() - self._started) * max(0, planned - passes) / max(1, passes)
        return f'{self._state()}, at most {timedelta(seconds=round(left))} left'

    def _state(self) -> str:
        return f'{self._name}: {self._part}, {self._robust} of {self._num_images} images still robust'

    def _finish_part(self) -> None:
        # What a part left out because images fell is not to come.
        self._parts[self._part] = self._in_part
        self._done += self._in_part
        self._in_part = 0
        if self._bar is not None:
            self._bar.total = sum(self._parts.values())
