"""What the script for a GPU machine leaves to do, and the table that it ends in."""

import argparse
import hashlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.config import Config, DictAction

from mmadvmoe.runtime.config_checks import check_options
from mmadvmoe.runtime.preflight import check_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    for name, seed, value in (('at_dense', 0, 50.0), ('advmoe', 0, 40.0), ('advmoe', 1, 44.0)):
        metrics = {f'{attack}/accuracy/top1': value for attack in ('clean', 'pgd50', 'ra', 'worst')}
        outcomes, content = tmp_path / f'outcomes_{name}_{seed}', json.dumps(metrics).encode()
        outcomes.mkdir()
        (outcomes / 'metrics.json').write_bytes(content)
        (outcomes / 'SHA256SUMS').write_text(f'{hashlib.sha256(content).hexdigest()}  metrics.json\n')
        (tmp_path / f'train_{name}_{seed}.done').write_text('log\n120 s\n')
    (tmp_path / 'benchmark_moe.json').write_text('[]')
    (tmp_path / 'settings').write_text('FORMAT=2 DEVICE=cpu SHORT=1 EPOCHS=2 DATA=data/cifar10_images\n')
    return tmp_path


def test_the_table(folder, monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['gpu_table.py', str(folder), '--device', 'cpu', '--epochs', '2'])
    runpy.run_path(str(ROOT / 'tools/gpu_table.py'), run_name='__main__')
    table = (folder / 'table.md').read_text()
    assert table == capsys.readouterr().out.rstrip('\n') + '\n'
    assert 'CIFAR-10 (JPEG), ResNet-18, r = 0.5, L-inf 8/255, 2 epochs for each side, CPU' in table
    assert '| AT (Dense) | 50.0 | 50.0 |  | 50.0 |  | 50.0 | 1 | 2.0 |' in table
    assert '| AdvMoE | 42.0 (40.0 to 44.0) |' in table
    assert table.index('AT (Dense)') < table.index('AdvMoE')
    assert len((folder / 'table.jsonl').read_text().splitlines()) == 3


def script(folder, *parts, **variables):
    env = {**os.environ, 'OUT': str(folder), 'PYTHON': sys.executable, 'SHORT': '1', **variables}
    command = ['bash', str(ROOT / 'tools/gpu_table.sh'), *parts]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def test_what_is_done_is_not_done_again(folder):
    for name in ('tests', 'train_advmoe_0', 'test_advmoe_0'):
        (folder / f'{name}.done').write_text('')
    done = script(folder, 'tests', 'table', ROWS='advmoe')
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line for line in done.stdout.splitlines() if line.endswith('done before')] == [
        '== tests: done before',
        '== train_advmoe_0: done before',
        '== test_advmoe_0: done before',
    ]
    assert (folder / 'table.md').exists()


@pytest.mark.parametrize('short', ['0', '1'])
def test_every_training_that_it_starts_passes_the_checks_before_a_training(tmp_path, short):
    assert script(tmp_path, 'table', PYTHON='echo', SHORT=short).returncode == 0
    started = sorted(tmp_path.glob('train_*.done'))
    assert len(started) == 7
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    for file in started:
        words = file.read_text().splitlines()[0].split()
        options = parser.parse_args(words[words.index('--cfg-options') :]).cfg_options
        cfg = Config.fromfile(ROOT / words[1])
        check_options(options, cfg)
        cfg.merge_from_dict(options)
        check_config(cfg)


def test_what_fails_is_named_and_the_rest_goes_on(folder):
    (folder / 'fails').write_text('#!/bin/sh\necho broken\nexit 1\n')
    (folder / 'fails').chmod(0o755)
    done = script(folder, 'benchmarks', PYTHON=str(folder / 'fails'))
    assert done.returncode == 1
    assert 'failed: benchmark_moe benchmark_training benchmark_experts' in done.stdout and 'broken' in done.stdout
    assert script(folder, 'speed').returncode == 2


def test_parts_made_with_other_settings_are_not_taken_for_these(tmp_path):
    assert script(tmp_path, 'table', PYTHON='echo', ROWS='advmoe').returncode == 0
    again = script(tmp_path, 'table', PYTHON='echo', ROWS='advmoe', SHORT='0', DEVICE='cpu')
    assert again.returncode == 2 and 'holds parts made with FORMAT=2 DEVICE=cpu SHORT=1' in again.stderr
    (tmp_path / 'settings').unlink()
    again = script(tmp_path, 'table', PYTHON='echo', ROWS='advmoe')
    assert again.returncode == 2 and 'settings that nobody wrote down' in again.stderr
    spaced = script(tmp_path / 'other', 'table', PYTHON='echo', DATA='my images')
    assert spaced.returncode == 2 and 'without white space' in spaced.stderr
