import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
import vit_family
from torch import nn

from mmadvmoe.moe import router_modules

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location('benchmark_moe', ROOT / 'tools/benchmarks/benchmark_moe.py')
benchmark_moe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark_moe)

ARCH = dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=64)
BACKBONE = dict(
    type='MoEBackbone',
    num_experts=4,
    routing='token',
    include=[r'ffn$'],
    backbone=dict(type='VisionTransformer', arch=ARCH, img_size=16, patch_size=4),
)
MEGABYTE = 2**20


def run(monkeypatch, *arguments):
    monkeypatch.setattr('sys.argv', ['benchmark_moe.py', '--family', 'vit', *map(str, arguments)])
    benchmark_moe.main()


def test_the_file_has_a_row_per_number_of_tokens_and_experts(monkeypatch, tmp_path, capsys):
    config, rows = tmp_path / 'tiny.py', tmp_path / 'rows.json'
    config.write_text(f'model = dict(backbone={BACKBONE!r})\n')
    arguments = ('--config', config, '--tokens', 4, 16, '--num-experts', 2, 8, '--batch-size', 4, '--rounds', 1)
    run(monkeypatch, *arguments, '--json', rows)
    found = json.loads(rows.read_text())
    assert [(row['tokens'], row['num_experts']) for row in found] == [(4, 2), (4, 8), (16, 2), (16, 8)]
    for row in found:
        ratios = [row.pop(f'{name}_over_limit') for name in ('forward', 'attack', 'peak_memory')]
        assert set(row) == {'tokens', 'num_experts'}
        assert all(math.isfinite(ratio) and ratio > 0 for ratio in ratios)
    assert '16 patches, N = 8' in capsys.readouterr().out


def test_every_expert_gets_tokens():
    torch.manual_seed(0)
    _, moe = vit_family.build_pair(BACKBONE, 4)
    images = torch.rand(16, 3, 16, 16)
    vit_family.spread_tokens(moe, images)
    for routing in moe.forward_routed(images)[1]:
        assert min(routing.counts) >= 0.4 * sum(routing.counts) / 4


def test_the_limit_has_the_gates_with_their_gradient():
    _, moe = vit_family.build_pair(BACKBONE, 4)
    gates = vit_family.Gates(router_modules(moe), 17)
    images = torch.rand(2, 3, 16, 16, requires_grad=True)
    logits = gates(images)
    assert logits.shape == (2, 2, 17, 4)
    (gradient,) = torch.autograd.grad(logits.square().sum(), images)
    assert gradient.flatten(1).count_nonzero(1).tolist() == [17 * 16] * 2


def test_peak_memory_is_that_of_tensors_that_live_at_a_time():
    network = nn.Linear(512, 512, bias=False)

    def step(model, images):
        for _ in range(3):
            kept = torch.empty(2 * MEGABYTE, dtype=torch.uint8)
            torch.empty(MEGABYTE, dtype=torch.uint8)
            del kept
        torch.empty(2 * MEGABYTE, dtype=torch.uint8)

    # The weights are 1 MiB.
    assert vit_family.peak_bytes(network, torch.empty(0), step) == 4 * MEGABYTE


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--tokens', '60'], '--tokens 60 must be a square number'),
        (['--config', ROOT / 'configs/advmoe_resnet18_cifar10.py'], 'routing="token" for --family vit'),
    ],
)
def test_mistakes_are_named(monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *arguments)
    assert message in f'{stopped.value} {capsys.readouterr().err}'
