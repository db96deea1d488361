"""What the benchmarks share: a device from the command line, and seconds on it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

#: Runs before anything is timed; on a GPU the first ones load kernels.
WARM_UP = dict(cpu=1, cuda=3)


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--device', choices=WARM_UP, default='cpu', help='[%(default)s]')


def check_device(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: there is no GPU')


def name_of(device: str) -> str:
    """For the heading of a table."""
    return torch.cuda.get_device_name() if device == 'cuda' else f'{torch.get_num_threads()} CPU threads'


def seconds_of(function: Callable[[], object], device: str) -> float:
    """How long a call takes: by the events of a GPU, which the call may leave at work.

    On a CPU with one thread what other processes take does not count; with several threads there is no such clock.
    """
    if device == 'cuda':
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    before = clock()
    function()
    return clock() - before


def warm_up(function: Callable[[], object], device: str) -> None:
    for _ in range(WARM_UP[device]):
        function()


def wait(device: str) -> None:
    """Until a GPU has done what it was given."""
    if device == 'cuda':
        torch.cuda.synchronize()
