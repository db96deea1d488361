"""The benchmark of robust evaluation: that it compares like with like and what it writes, not how fast anything is."""

import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmpretrain.registry import MODELS
from tiny_models import dense_backbone

from mmadvmoe.attacks import Victim, build_attack

ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / 'tools/benchmarks'))
    return importlib.import_module('benchmark_evaluation')


def _model() -> dict:
    return dict(
        type='mmpretrain.ImageClassifier',
        backbone=dict(
            type='MoEBackbone',
            num_experts=2,
            include=[r'layer1.*conv\d'],
            router=dict(type='ResNetRouter', base_channels=4, num_blocks=1),
            backbone=dense_backbone(4),
        ),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=10, in_channels=8),
    )


def test_both_sides_attack_with_the_same_settings(benchmark) -> None:
    victim = Victim(MODELS.build(_model()))
    bare = benchmark.bare_autoattack(victim, 0.2, 60, 700)
    own = build_attack(dict(type='AutoAttack', eps=0.2, steps=60, n_queries=700), victim).attack
    assert bare.attacks_to_run == own.parts
    kept_at = {'apgd-ce': 'apgd', 'apgd-t': 'apgd_targeted', 'fab-t': 'fab', 'square': 'square'}
    for name in own.parts:
        ours, theirs = own.authors_part(name), getattr(bare, kept_at[name])
        assert type(ours) is type(theirs)
        settings = {key: value for key, value in vars(ours).items() if isinstance(value, (int, float, str, bool))}
        # Set by them when it is FAB's turn.
        settings.pop('targeted', None)
        assert {'eps', 'norm', 'n_restarts'} <= settings.keys()
        assert settings == {key: vars(theirs)[key] for key in settings}


def test_it_runs_and_writes_all_ratios(benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    test_set = dict(dataset=dict(type='Digits', split='test', pipeline=[dict(type='PackInputs')]))
    Config(dict(default_scope='mmpretrain', model=_model(), test_dataloader=test_set)).dump(tmp_path / 'config.py')
    torch.manual_seed(0)
    torch.save(dict(meta={}, state_dict=MODELS.build(_model()).state_dict()), tmp_path / 'model.pth')
    arguments = [str(tmp_path / 'config.py'), str(tmp_path / 'model.pth'), '--images', '6', '--batch-size', '4']
    arguments += ['--iterations', '1', '--queries', '1', '--rounds', '1', '--json', str(tmp_path / 'result.json')]
    monkeypatch.setattr('sys.argv', ['benchmark_evaluation.py', *arguments])
    monkeypatch.setattr(benchmark, 'STEPS', 2)
    monkeypatch.setattr(benchmark, 'PGD_REPEATS', 1)
    monkeypatch.setattr(benchmark, 'RATIOS', benchmark.RATIOS | {'pgd50_over_steps': ('pgd2', 'attack_steps')})
    benchmark.main()
    result = json.loads((tmp_path / 'result.json').read_text())
    for clock in ('wall', 'cpu'):
        assert result['ratios'][clock].keys() == benchmark.RATIOS.keys()
        assert all(math.isfinite(ratio) and ratio > 0 for ratio in result['ratios'][clock].values())
    assert set(result['standing']) == {'bare_autoattack', 'autoattack', 'cascade', 'cascade_held', 'pgd2'}
    assert result['standing']['cascade'] <= result['standing']['pgd2'] <= result['images'] == 6
    assert 'cascade_over_bare' in capsys.readouterr().out
