"""What a run shows in the console; its log file holds everything."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmengine.logging import MMLogger
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch import nn

#: How messages begin that are for the log file alone.
FILE_ONLY = (
    '\n' + '-' * 60 + '\nSystem environment:',
    'Config:\n',
    'Hooks will be executed in the following order',
    'Exp name: ',
    'Checkpoints will be saved to ',
    'Saving checkpoint at ',
    'Distributed training is not used, ',
)
#: Warnings that MMEngine gives of itself in every run.
OF_MMENGINE = ('"FileClient" will be deprecated', '"HardDiskBackend" is the alias of')
#: In training by turns the schedule of the group that waits goes on before its optimizer has stepped.
_SCHEDULE_FIRST = r'Detected call of `scheduler.step\(\)` before'
_RESULT = re.compile(r'^(Epoch\((?:val|test)\) ?)(?:(\[\d+\])\[\d+/\d+\]|\[\d+/\d+\])? +(?=\S+: )')
#: The end of a robust evaluation, whose results come next.
_EVALUATED = re.compile(r'Robust evaluation: (\d+) of \1 images')
_ITEM = re.compile(r'(\S+): (-?[\d.]+|nan)')
_ACCURACY, _LOAD = '/accuracy/top1', 'clean/expert_share/'


@contextmanager
def quiet() -> Iterator[None]:
    """Show nothing below warnings meanwhile: without a log file, ``init_weights`` shows every parameter."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(level)


class ConsoleFilter(logging.Filter):
    """Keeps environment, config, hook table and the noise of each epoch out of the console."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is shown."""
        message = record.getMessage()
        if record.levelno > logging.INFO:
            return not message.startswith(OF_MMENGINE)
        return not (message.startswith(FILE_ONLY) or _EVALUATED.match(message))


class ConsoleFormatter(logging.Formatter):
    """Shows the metrics of a robust evaluation as one short line, and all else as ``inner`` does.

    Args:
        inner (Formatter): That of MMEngine.
    """

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self.inner = inner

    def format(self, record: logging.LogRecord) -> str:
        """One record as text."""
        short = shorten(record.getMessage())
        if short is None:
            return self.inner.format(record)
        copied = logging.makeLogRecord({**vars(record), 'msg': short, 'args': ()})
        return self.inner.format(copied)


def shorten(message: str) -> str | None:
    """The results of a robust evaluation in one line, or None for another message.

    Accuracies in percent, the worst case last, and the load of each expert on clean images:
    ``Epoch(val) [10]  SA 95.0  pgd10 70.6  routepgd10 60.0  worst 58.9  load 66/34``.
    """
    begin = _RESULT.match(message)
    items = dict(_ITEM.findall(message)) if begin else {}
    if f'clean{_ACCURACY}' not in items:
        return None
    shown = {name.removesuffix(_ACCURACY): value for name, value in items.items() if name.endswith(_ACCURACY)}
    parts = [f'{"SA" if name == "clean" else name} {float(value):.1f}' for name, value in shown.items()]
    load = [f'{100 * float(value):.0f}' for name, value in items.items() if name.startswith(_LOAD)]
    if load:
        parts.append(f'load {"/".join(load)}')
    return f'{begin[1]}{begin[2] or ""}  ' + '  '.join(parts)


@RUNNERS.register_module()
class ConsoleRunner(Runner):
    """MMEngine's Runner, whose console shows what a reader watches: losses, results and warnings.

    Environment, hook table and config are in the log file, with every share and number of an evaluation.
    """

    def train(self) -> nn.Module:
        """Train, without a warning about schedules that training by turns cannot but give."""
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', _SCHEDULE_FIRST)
            return super().train()

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        """MMEngine's logger, its console filtered; arguments as for the Runner's."""
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if type(handler) is logging.StreamHandler and not isinstance(handler.formatter, ConsoleFormatter):
                handler.addFilter(ConsoleFilter())
                handler.setFormatter(ConsoleFormatter(handler.formatter))
        return logger
