"""The benchmark of the mixture: that it runs and what it writes, not how fast anything is."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location('benchmark_moe', ROOT / 'tools/benchmarks/benchmark_moe.py')
benchmark_moe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark_moe)

TINY = ['--num-experts', '2', '--batch-size', '4', '--image-size', '8', '--rounds', '1']


def run(monkeypatch, *arguments):
    monkeypatch.setattr('sys.argv', ['benchmark_moe.py', *arguments])
    benchmark_moe.main()


def test_the_file_has_a_row_per_number_of_experts(monkeypatch, tmp_path, capsys):
    run(monkeypatch, *TINY, '--json', str(tmp_path / 'rows.json'))
    (row,) = json.loads((tmp_path / 'rows.json').read_text())
    assert list(benchmark_moe.STEPS) == ['forward', 'attack', 'training']
    ratios = {f'{kind}_{name}' for kind in benchmark_moe.STEPS for name in benchmark_moe.RATIOS}
    assert set(row) == {'num_experts', *ratios}
    assert row['num_experts'] == 2
    assert all(math.isfinite(row[name]) and row[name] > 0 for name in ratios)
    assert 'N = 2' in capsys.readouterr().out


def test_every_expert_gets_images():
    config = Config.fromfile(ROOT / 'configs/_base_/models/moe_resnet18_cifar.py').model.backbone.to_dict()
    torch.manual_seed(0)
    moe = benchmark_moe.build_backbone({**config, 'num_experts': 4})
    images = torch.rand(64, 3, 8, 8)
    benchmark_moe.spread_images(moe.router, images)
    counts = moe.router(images).argmax(dim=1).bincount(minlength=4)
    assert counts.min() >= 4


def test_ratios_are_taken_inside_a_round():
    seconds = dict(dense=[1.0, 10.0], router=[1.0, 10.0], moe=[3.0, 30.0], masked=[6.0])
    ratios = benchmark_moe.compare(seconds)
    assert ratios['over_limit'].tolist() == [1.5, 1.5]
    assert ratios['speedup_over_masked'].tolist() == [2.0]


def test_both_sides_compute_in_one_layout():
    config = Config.fromfile(ROOT / 'configs/_base_/models/moe_resnet18_cifar.py').model.backbone.to_dict()
    moe = benchmark_moe.build_backbone(config)
    dense = benchmark_moe.LikeMixture(benchmark_moe.build_backbone(config['backbone']))
    layouts = []
    for network in (moe.network, dense.network):
        network.layer1.register_forward_pre_hook(lambda _, args: layouts.append(args[0].is_contiguous()))
    for training in (False, True):
        benchmark_moe.set_mode([moe, dense], training)
        for model in (moe, dense):
            model(torch.rand(4, 3, 8, 8))
    assert layouts == [False, False, True, True]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--num-experts', '1'], 'at least 2 experts'),
        (['--rounds', '0'], '--rounds 0'),
        ([*TINY, '--config', str(ROOT / 'configs/baselines/at_dense_resnet18_cifar10.py')], 'MoEBackbone'),
        ([*TINY, '--config', str(ROOT / 'configs/advmoe_resnet18_cifar10_layer.py')], 'routing'),
    ],
)
def test_mistakes_are_named(monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *arguments)
    assert message in f'{stopped.value} {capsys.readouterr().err}'
