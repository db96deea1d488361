"""Both stages of the pruned baseline: what is learned, what is fixed, and what it costs in the end."""

import copy

import pytest
import torch
from mmengine.config import Config
from mmengine.model import PretrainedInit
from mmengine.registry import init_default_scope
from mmengine.runner import Runner, load_checkpoint
from mmpretrain.registry import MODELS

import mmadvmoe  # noqa: F401
from mmadvmoe.cost import count_cost
from mmadvmoe.models import AdvDataPreprocessor

init_default_scope('mmpretrain')
SCORES = 'configs/baselines/at_sparse_resnet18_digits_scores.py'
WEIGHTS = 'configs/baselines/at_sparse_resnet18_digits.py'
SHAPE = (3, 8, 8)


def build(path=SCORES, **overrides):
    torch.manual_seed(0)
    cfg = Config.fromfile(path).model
    cfg.update(overrides)
    model = MODELS.build(cfg)
    model.init_weights()
    return model


def randomise_norms(model):
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.5, 0.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias)
    return model


def test_measured_cost_is_that_of_the_pathway():
    pathway = count_cost(Config.fromfile('configs/advmoe_resnet18_digits.py')).pathway_gflops
    model = build()
    pruned = count_cost(model.deployed(), SHAPE)
    assert pruned == count_cost(Config.fromfile(SCORES)) == count_cost(model, SHAPE)
    assert abs(pruned.gflops / pathway - 1) < 0.05
    assert pruned.params_total < 0.5 * sum(p.numel() for p in model.parameters())


def test_deployed_network_gives_the_same_logits():
    model = randomise_norms(build()).eval()
    images = torch.rand(4, *SHAPE)
    torch.testing.assert_close(model.deployed().eval()(images), model(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ('preprocessor', 'mean', 'std'),
    [
        (dict(mean=[127.5], std=[64.0]), 127.5, 64.0),
        (AdvDataPreprocessor(mean=[127.5], std=[64.0]), 127.5, 64.0),
        (None, 0.0, 255.0),
    ],
)
def test_deployed_network_keeps_the_scale_of_its_images(preprocessor, mean, std):
    deployed = build(data_preprocessor=preprocessor).deployed()
    assert not deployed.data_preprocessor.to_rgb
    if isinstance(preprocessor, dict):
        assert build(data_preprocessor=dict(preprocessor, to_rgb=True)).deployed().data_preprocessor.to_rgb
    assert deployed.data_preprocessor.mean.item() == mean and deployed.data_preprocessor.std.item() == std


def test_kept_are_the_largest_scores_and_only_those_are_seen():
    model = randomise_norms(build()).eval()
    gate = model.gates[1]
    with torch.no_grad():
        gate.scores.copy_(torch.linspace(-1, 0.5, len(gate.scores)))
    assert gate.kept().tolist() == sorted(gate.scores.abs().argsort(descending=True)[: gate.keep].tolist())
    images = torch.rand(2, *SHAPE)
    before = model(images)
    producer = model.get_submodule(gate.group.producers[0])
    lost = sorted(set(range(gate.group.channels)) - set(gate.kept().tolist()))
    with torch.no_grad():
        producer.weight[lost] += 5
    assert torch.equal(model(images), before)
    with torch.no_grad():
        producer.weight[gate.kept()[0]] += 5
    assert not torch.allclose(model(images), before)


def test_scores_get_the_gradient_of_a_mask():
    gate = build().gates[0]
    gate.scores.data.copy_(torch.linspace(-1, 1, gate.group.channels))
    weights = torch.arange(float(gate.group.channels))
    (gate() * weights).sum().backward()
    assert torch.equal(gate.scores.grad, weights * gate.scores.sign())


def test_copy_masks_by_its_own_scores():
    model = randomise_norms(build()).eval()
    images = torch.rand(2, *SHAPE)
    before = model(images)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for gate in other.gates:
            gate.scores.copy_(1 / (gate.scores + 0.1))
    assert not torch.allclose(other(images), before)
    assert torch.equal(model(images), before)


def test_scores_start_as_the_size_of_the_weights_of_the_dense_checkpoint(tmp_path):
    dense = MODELS.build(Config.fromfile('configs/baselines/at_dense_resnet18_digits.py').model)
    weight = dense.backbone.layer1[0].conv1.weight.data
    weight *= torch.linspace(1, 9, len(weight)).view(-1, 1, 1, 1)
    torch.save(dict(state_dict=dense.state_dict()), tmp_path / 'dense.pth')
    model = build()
    load_checkpoint(model, str(tmp_path / 'dense.pth'), strict=True)
    (gate,) = [gate for gate in model.gates if gate.group.producers == ('backbone.layer1.0.conv1',)]
    sizes = dense.backbone.layer1[0].conv1.weight.abs().sum((1, 2, 3))
    torch.testing.assert_close(gate.scores.detach(), (sizes / sizes.max()).detach())


@pytest.mark.parametrize('several', [False, True])
@pytest.mark.parametrize('kind', ['Pretrained', PretrainedInit])
def test_scores_of_a_checkpoint_to_start_from_are_kept(tmp_path, kind, several):
    learned = build()
    with torch.no_grad():
        learned.gates[0].scores.copy_(torch.rand_like(learned.gates[0].scores))
    torch.save(dict(state_dict=learned.state_dict()), tmp_path / 'scores.pth')
    init_cfg = dict(type=kind, checkpoint=str(tmp_path / 'scores.pth'))
    model = build(init_cfg=[init_cfg] if several else init_cfg)
    assert torch.equal(model.gates[0].scores, learned.gates[0].scores)


def test_unknown_stage_and_unreachable_cost_are_named():
    with pytest.raises(ValueError, match="did you mean 'weights'"):
        build(stage='weight')
    with pytest.raises(ValueError, match='can be reached'):
        build(target=dict(backbone=dict(base_channels=64), head=dict(in_channels=512)))


def _train(path, work_dir, load_from=None):
    cfg = Config.fromfile(path)
    cfg.merge_from_dict(
        dict(
            work_dir=str(work_dir),
            load_from=load_from,
            experiment_name=work_dir.name,
            log_level='ERROR',
            train_dataloader=dict(batch_size=16, dataset=dict(indices=32)),
            train_cfg=dict(max_epochs=1),
            val_cfg=None,
            val_dataloader=None,
            val_evaluator=None,
        )
    )
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner.model, str(work_dir / 'epoch_1.pth')


def test_both_stages_run_from_their_configs(tmp_path):
    _, dense = _train('configs/baselines/at_dense_resnet18_digits.py', tmp_path / 'dense')
    weights = torch.load(dense, weights_only=False)['state_dict']
    first, scores = _train(SCORES, tmp_path / 'scores', dense)
    trained = {name: value for name, value in first.named_parameters()}
    assert all(torch.equal(value, weights[name]) for name, value in trained.items() if not name.startswith('gates.'))
    start = build()
    start.load_state_dict({name: value for name, value in weights.items()}, strict=True)
    assert all((a.scores != b.scores).any() for a, b in zip(first.gates, start.gates))

    second, _ = _train(WEIGHTS, tmp_path / 'weights', scores)
    assert all(torch.equal(a.scores, b.scores) for a, b in zip(second.gates, first.gates))
    moved = [name for name, value in second.named_parameters() if not torch.equal(value, trained[name])]
    assert moved == [name for name, value in second.named_parameters() if not name.startswith('gates.')]
    images = torch.rand(8, *SHAPE)
    second.eval()
    torch.testing.assert_close(second.deployed().eval()(images), second(images), atol=1e-5, rtol=1e-5)
