"""Leaves out what a Runner does for readers alone, which would take longer than the training of a tiny run.

MMEngine lays out the config with yapf, once for the log and once for the copy in the work directory, and calls the
compilers for their versions. Importing this module leaves the layout out, and asks for the versions once a process.
"""

import functools

import mmengine.config.config
import mmengine.runner.runner

mmengine.config.config.FormatCode = lambda text, **_: (text, True)
mmengine.runner.runner.collect_env = functools.lru_cache(mmengine.runner.runner.collect_env)
