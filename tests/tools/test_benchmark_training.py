"""The benchmark of training: that it compares like with like and what it writes, not how fast anything is."""

import json
import math

import benchmark_training
import pytest
import timing
import torch

TINY = ['--batch-size', '4', '--image-size', '8', '--rounds', '1', '--threads', '1']


@pytest.fixture
def run(monkeypatch, tmp_path):
    def call(*arguments):
        file = tmp_path / 'found.json'
        monkeypatch.setattr('sys.argv', ['benchmark_training.py', *arguments, *TINY, '--json', str(file)])
        benchmark_training.main()
        return json.loads(file.read_text())

    return call


def test_what_is_written(run, small_config, capsys):
    found = run('parts', 'masked', 'experts', '--num-experts', '2', '3', '--config', small_config)
    assert set(found) == {'config', 'batch_size', 'device', 'parts', 'masked', 'experts'}
    assert set(found['parts']['ms']) == {
        'clean pass',
        *(f'{part} ({turn})' for part in ('attack step', 'loss and gradient', 'update') for turn in TURNS),
    }
    assert [row['num_experts'] for row in found['masked']] == [2, 3]
    ratios = [found['parts']['over_parts'], found['experts']['time'], found['experts']['memory']]
    ratios += [row['masked_over'] for row in found['masked']]
    assert all(math.isfinite(ratio) and ratio > 0 for ratio in ratios)
    assert 'N = 3: masked form over an iteration' in capsys.readouterr().out


TURNS = ('experts', 'router')


@pytest.fixture
def small_config(tmp_path):
    path = tmp_path / 'small.py'
    path.write_text(
        f'_base_ = {str(benchmark_training.CONFIG)!r}\n'
        'model = dict(backbone=dict(router=dict(base_channels=2, num_blocks=1), '
        'backbone=dict(stem_channels=4, base_channels=4)), head=dict(in_channels=32))\n'
    )
    return str(path)


def arguments_of(monkeypatch, *arguments):
    monkeypatch.setattr('sys.argv', ['benchmark_training.py', *arguments, *TINY])
    return benchmark_training.parse_args()


def test_both_forms_compute_the_same(monkeypatch, small_config):
    """On the same weights the masked form gives the logits of the mixture, for classes and experts."""
    training = benchmark_training.Training(arguments_of(monkeypatch, '--config', small_config), 3)
    masked = benchmark_training.Masked(training)
    masked.network.eval()
    with torch.no_grad():
        logits, router_logits = masked.forward(training.images)
        expected, (routing,) = training._clean()
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(router_logits, routing.logits, rtol=1e-3, atol=1e-5)
    before = [p.detach().clone() for p in masked.network.parameters()]
    masked.iterate()
    moved = [not torch.equal(a, b) for a, b in zip(before, masked.network.parameters())]
    router = {id(p) for p in masked.backbone.router.parameters()}
    assert any(m for m, p in zip(moved, masked.network.parameters()) if id(p) in router)
    assert any(m for m, p in zip(moved, masked.network.parameters()) if id(p) not in router)


def test_images_go_to_all_experts(monkeypatch, small_config):
    args = arguments_of(monkeypatch, '--config', small_config)
    args.batch_size = 32
    training = benchmark_training.Training(args, 3)
    loads = []
    router = training.model.backbone.router
    router.register_forward_hook(lambda _, args, logits: loads.append(logits.argmax(1).bincount(minlength=3).tolist()))
    training.seconds(1)
    assert len(loads) > 20 and all(min(load) > 0 for load in loads), 'in attacks and losses of a training'


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['speed'], "'speed' is unknown; allowed: parts"),
        (['throughput'], 'throughput needs --device cuda'),
        (['--num-experts', '1'], 'at least 2'),
    ],
)
def test_mistakes_are_named(monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit):
        arguments_of(monkeypatch, *arguments)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
@pytest.mark.parametrize('name', ['benchmark_moe', 'benchmark_training', 'benchmark_evaluation'])
def test_a_gpu_that_is_not_there_is_named(monkeypatch, capsys, name):
    module = __import__(name)
    monkeypatch.setattr('sys.argv', [f'{name}.py', '--device', 'cuda', *(['c', 'd'] if 'evaluation' in name else [])])
    with pytest.raises(SystemExit):
        module.parse_args()
    assert '--device cuda: there is no GPU' in capsys.readouterr().err


def test_seconds():
    calls = []
    assert timing.seconds_of(lambda: calls.append(sum(range(10**5))), 'cpu') > 0
    timing.warm_up(lambda: calls.append(0), 'cpu')
    assert len(calls) == 2
