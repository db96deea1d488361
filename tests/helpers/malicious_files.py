"""What a malicious checkpoint may hold."""

import functools
import os
import pickle

import numpy as np
import torch
from mmengine.logging import HistoryBuffer


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args

    def __call__(self):
        """The pickler wants what it writes as a function to be callable."""


def malicious(marker):
    """Every way in that the list of safe globals might leave open."""
    command = f'touch {marker}'
    init = Call(getattr, HistoryBuffer, '__init__')
    return {
        'os.system': Call(os.system, command),
        'eval': Call(eval, f'open({str(marker)!r}, "w")'),
        'import': Call(__import__, 'os'),
        'globals of HistoryBuffer': Call(getattr, init, '__globals__'),
        'getattr of another object': Call(getattr, torch.Tensor, 'numpy'),
        'register a function': Call(getattr, HistoryBuffer, 'register_statistics'),
        'call of what getattr serves': Call(Call(getattr, HistoryBuffer, 'mean'), 1),
        'partial': Call(functools.partial, os.system, command),
        'object array': np.array([Call(os.system, command)], dtype=object),
        'array of pointers': np.dtype('O'),
        'array with fields': np.zeros(1, dtype=[('pointer', 'i8')]),
    }


class PythonPickle:
    """The pickler in Python writes calls of things that C's refuses to write."""

    Pickler = pickle._Pickler
    dump = staticmethod(pickle._dump)
    __name__ = 'pickle'
