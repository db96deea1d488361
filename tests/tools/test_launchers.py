"""The launch scripts: what they start, with which arguments and environment."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / 'tools'
VARIABLES = ('NNODES', 'NODE_RANK', 'MASTER_ADDR', 'PORT', 'GPUS', 'GPUS_PER_NODE', 'CPUS_PER_TASK')
VARIABLES += ('SRUN_ARGS', 'OMP_NUM_THREADS', 'PYTHONPATH', 'PYTHON')

RECORDER = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$RECORD"
echo "$OMP_NUM_THREADS $PYTHONPATH" > "$RECORD.env"
"""


@pytest.fixture
def launch(tmp_path):
    """Run a script with python and srun replaced by a recorder; give its arguments and env."""
    for name in ('python', 'srun'):
        (tmp_path / name).write_text(RECORDER)
        (tmp_path / name).chmod(0o755)
    record = tmp_path / 'record'

    def run(script, *arguments, **variables):
        env = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        env.update(variables, RECORD=str(record), PATH=f'{tmp_path}:{env["PATH"]}')
        done = subprocess.run(['bash', str(TOOLS / script), *arguments], env=env, capture_output=True, text=True)
        if done.returncode != 0:
            assert not record.exists()
            return done.returncode, done.stderr
        return record.read_text().splitlines(), Path(f'{record}.env').read_text().split()

    return run


@pytest.mark.parametrize('script', sorted(TOOLS.glob('*.sh')), ids=lambda path: path.name)
def test_syntax_and_mode(script):
    assert subprocess.run(['bash', '-n', str(script)]).returncode == 0
    # Those without a shebang are there to be sourced.
    assert (
        os.access(script, os.X_OK) == script.read_text().startswith('#!') == (script.stem not in ('torchrun', 'slurm'))
    )


@pytest.mark.parametrize(
    ('script', 'arguments'),
    [
        ('dist_train.sh', ['a.py']),
        ('dist_test.sh', ['a.py', 'a.pth']),
        ('slurm_train.sh', ['part', 'job', 'a.py']),
        ('slurm_test.sh', ['part', 'job', 'a.py']),
    ],
)
def test_missing_arguments_print_the_usage(launch, script, arguments):
    code, message = launch(script, *arguments)
    assert code == 2
    assert message.startswith('usage: ') and 'CONFIG' in message


@pytest.mark.parametrize('gpus', ['0', '-1', 'two', '1 2', ''])
def test_a_wrong_number_of_processes_is_refused(launch, gpus):
    code, message = launch('dist_train.sh', 'a.py', gpus)
    assert code == 2
    assert f"got '{gpus}'" in message


def test_single_machine_takes_a_free_port(launch):
    arguments, (threads, path) = launch('dist_train.sh', 'my configs/a.py', '2', '--cfg-options', 'a=b c')
    script = str(TOOLS / 'train.py')
    assert arguments == [
        *('-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', script),
        *('my configs/a.py', '--launcher', 'pytorch', '--cfg-options', 'a=b c'),
    ]
    assert 1 <= int(threads) <= max(1, os.cpu_count() // 2)
    assert Path(path).resolve() == TOOLS.parent


def test_several_machines(launch):
    arguments, (threads, _) = launch(
        'dist_test.sh',
        *('a.py', 'a.pth', '8', '--out', 'o.pkl'),
        NNODES='2',
        NODE_RANK='1',
        MASTER_ADDR='host',
        OMP_NUM_THREADS='3',
    )
    assert arguments[2:] == [
        *('--nnodes', '2', '--node-rank', '1', '--master-addr', 'host', '--master-port', '29500'),
        *('--nproc-per-node', '8', str(TOOLS / 'test.py'), 'a.py', 'a.pth'),
        *('--launcher', 'pytorch', '--out', 'o.pkl'),
    ]
    assert threads == '3'


def test_a_given_port_is_used_on_a_single_machine(launch):
    arguments, _ = launch('dist_train.sh', 'a.py', '1', PORT='29511')
    assert arguments[arguments.index('--master-port') + 1] == '29511'
    assert '--standalone' not in arguments


@pytest.mark.parametrize(
    ('script', 'fourth', 'expected'),
    [
        ('slurm_train.sh', 'work dir', ['train.py', 'a.py', '--work-dir', 'work dir']),
        ('slurm_test.sh', 'a.pth', ['test.py', 'a.py', 'a.pth']),
    ],
)
def test_slurm(launch, script, fourth, expected):
    arguments, _ = launch(
        script,
        *('part', 'my job', 'a.py', fourth, '--amp'),
        GPUS='16',
        GPUS_PER_NODE='4',
        CPUS_PER_TASK='6',
        SRUN_ARGS='--gres=none --time=1:00',
    )
    assert arguments == [
        *('--partition=part', '--job-name=my job', '--gres=gpu:4', '--ntasks=16'),
        *('--ntasks-per-node=4', '--cpus-per-task=6', '--kill-on-bad-exit=1'),
        *('--gres=none', '--time=1:00', 'python', '-u', str(TOOLS / expected[0]), *expected[1:]),
        *('--launcher', 'slurm', '--amp'),
    ]


def test_python_can_be_named(launch, tmp_path):
    shutil.copy(tmp_path / 'python', tmp_path / 'python3.99')
    (tmp_path / 'python').write_text('#!/bin/sh\nexit 1\n')
    arguments, _ = launch('dist_train.sh', 'a.py', '1', PYTHON='python3.99')
    assert arguments[1] == 'torch.distributed.run'
