"""Other processes on the CPU: scripts of their own, and forks, which need not import everything once more."""

import os
import runpy
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import torch
from torch import multiprocessing

ROOT = Path(__file__).parents[2]


def start(command, tmp_path, **variables):
    """A script as a process of its own."""
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


def run_forks(function, *arguments, variables):
    """Call a function in one fork for each set of environment variables; an error in one of them is raised here."""
    multiprocessing.start_processes(_call, (variables, function, arguments), nprocs=len(variables), start_method='fork')


def _call(number, variables, function, arguments):
    torch.set_num_threads(1)  # other threads did not come along through the fork
    for name in ('MASTER_ADDR', 'MASTER_PORT'):
        os.environ.pop(name, None)
    os.environ.update(variables[number] | dict(CUDA_VISIBLE_DEVICES='-1'))
    function(*arguments)


def variables_of_ranks(count=2):
    """What PyTorch reads of a launcher, for each of several processes."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    both = dict(WORLD_SIZE=str(count), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    return [dict(both, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(count)]


def start_script_in_fork(command, cwd=None, stdout=None, env=None):
    """``subprocess.Popen([sys.executable, *command])`` in a fork, printing to ``stdout``."""
    process = multiprocessing.get_context('fork').Process(target=_run_script, args=(command, cwd, stdout, env))
    process.start()
    return process


def run_script_in_fork(command, cwd=None, stdout=None, env=None):
    """As :func:`start_script_in_fork`, to its end: the exit status."""
    process = start_script_in_fork(command, cwd, stdout, env)
    process.join(600)
    return process.exitcode


def _run_script(command, cwd, stdout, env):
    for number in (1, 2) if stdout else ():
        os.dup2(stdout.fileno(), number)
    sys.stdout, sys.stderr = (os.fdopen(number, 'w', buffering=1) for number in (1, 2))
    torch.set_num_threads(1)
    os.environ.update(env or {})
    os.chdir(cwd or os.curdir)
    sys.argv, sys.path[:0] = command, [str(Path(command[0]).parent)]
    try:
        runpy.run_path(command[0], run_name='__main__')
    except Exception:
        traceback.print_exc()
        os._exit(1)
    # As a fork of a process that has other tasks: nothing of these is brought to an end here.
    sys.stdout.flush()
    os._exit(0)
