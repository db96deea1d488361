"""Leaves out what a Runner does for readers alone, which would take longer than the training of a tiny run.

MMEngine lays out the config with yapf, once for the log and once for the copy in the work directory, and calls the
compilers for their versions. Importing this module leaves the layout out, and asks for the versions once a process.
It also reads each file below ``configs/`` once a process, which stay as they are while tests run; most are read again
and again, as bases of others.
"""

import copy
import functools
from pathlib import Path

import mmengine.config.config
import mmengine.runner.runner
from mmengine.config import Config

CONFIGS = Path(__file__).parents[2] / 'configs'

mmengine.config.config.FormatCode = lambda text, **_: (text, True)
mmengine.runner.runner.collect_env = functools.lru_cache(mmengine.runner.runner.collect_env)

_read = Config._file2dict
_read_once = functools.lru_cache(maxsize=None)(_read)


def _file2dict(filename, *arguments, **settings):
    path = Path(filename).absolute()
    if CONFIGS not in path.parents:
        return _read(filename, *arguments, **settings)
    content, text, variables = _read_once(str(path), *arguments, **settings)
    return copy.deepcopy(content), text, dict(variables)


Config._file2dict = staticmethod(_file2dict)
