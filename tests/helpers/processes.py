"""Scripts started as processes of their own, on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def start(command, tmp_path, **variables):
    env = {name: value for name, value in os.environ.items() if not name.startswith('MASTER_')}
    paths = [str(ROOT), str(ROOT / 'tests' / 'helpers'), *filter(None, [env.get('PYTHONPATH')])]
    env.update(dict(PYTHONPATH=os.pathsep.join(paths), CUDA_VISIBLE_DEVICES='-1', OMP_NUM_THREADS='1') | variables)
    return subprocess.Popen(
        [sys.executable, *command, str(tmp_path)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(processes):
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
