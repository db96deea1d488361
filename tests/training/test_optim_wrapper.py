import pytest
import torch
from mmengine.optim import AmpOptimWrapper, OptimWrapper, build_optim_wrapper
from mmpretrain.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from tiny_runs import group_cfg, model_cfg, turns_cfg
from torch import nn

from mmadvmoe.moe import BaseRouter, split_parameters
from mmadvmoe.runtime.preflight import check_config
from mmadvmoe.training.alternation import TurnSchedule
from mmadvmoe.training.optim_wrapper import AlternatingOptimWrapper, AlternatingOptimWrapperConstructor


class Routed(nn.Module):
    """Two weights, one below a router."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(1, 1, bias=False)
        self.router = BaseRouter(2)
        self.router.weight = nn.Parameter(torch.ones(1))

    def forward(self):
        return self.body.weight.sum() * self.router.weight.sum()


@pytest.fixture(scope='module')
def model():
    return MODELS.build(model_cfg())


def settings(model, optim_wrapper):
    """The param group of each parameter, by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: group for group in optim_wrapper.optimizer.param_groups for parameter in group['params']
    }


@pytest.mark.parametrize('paramwise', [None, dict(norm_decay_mult=0.0, bypass_duplicate=True)])
def test_each_parameter_is_in_exactly_one_group(model, paramwise):
    wrapper = build_optim_wrapper(model, turns_cfg(paramwise_cfg=paramwise))
    for name, named in split_parameters(model).items():
        assert set(settings(model, wrapper[name])) == {parameter for parameter, _ in named}


def test_paramwise_options_keep_full_names_and_module_types(model):
    cfg = turns_cfg()
    cfg['experts']['paramwise_cfg'] = dict(
        norm_decay_mult=0.0, custom_keys={'backbone.network.conv1': dict(lr_mult=0.1)}
    )
    cfg['router']['paramwise_cfg'] = dict(bias_lr_mult=2.0)
    wrapper = build_optim_wrapper(model, cfg)
    experts, router = settings(model, wrapper['experts']), settings(model, wrapper['router'])
    assert experts['backbone.network.conv1.weight']['lr'] == pytest.approx(0.005)
    norm = next(n for n in experts if n.endswith('bn1.weight'))
    assert experts[norm]['weight_decay'] == 0 and experts[norm]['lr'] == 0.05
    assert experts['head.fc.bias']['weight_decay'] == 1e-3
    assert router['backbone.router.fc.bias']['lr'] == 0.1
    assert router['backbone.router.bn1.weight']['weight_decay'] == 1e-3


def test_layer_wise_decay_of_a_vit():
    vit = MODELS.build(
        dict(
            type='ImageClassifier',
            backbone=dict(
                type='MoEBackbone',
                num_experts=2,
                include=[r'ffn.*layers\.1'],
                routing='layer',
                backbone=dict(
                    type='VisionTransformer',
                    arch=dict(embed_dims=8, num_layers=2, num_heads=2, feedforward_channels=8),
                    img_size=8,
                    patch_size=4,
                ),
            ),
            head=dict(type='VisionTransformerClsHead', num_classes=3, in_channels=8),
        )
    )
    cfg = turns_cfg()
    cfg['experts'] |= dict(
        constructor='LearningRateDecayOptimWrapperConstructor',
        paramwise_cfg=dict(layer_decay_rate=0.5),
    )
    experts = settings(vit, build_optim_wrapper(vit, cfg)['experts'])
    lr = {name: group['lr'] for name, group in experts.items()}
    assert lr['head.layers.head.weight'] == 0.05
    first, second = (lr[f'backbone.network.layers.{i}.ln1.weight'] for i in (0, 1))
    assert first == pytest.approx(second / 2) and second < 0.05


def test_parameters_come_back_after_building(model):
    before = {name: id(p) for name, p in model.named_parameters()}
    build_optim_wrapper(model, turns_cfg())
    assert {name: id(p) for name, p in model.named_parameters()} == before


def with_group(name, group):
    return {**turns_cfg(), name: group}


def without(*keys):
    cfg = turns_cfg()
    for key in keys[:-1]:
        cfg[key] = dict(cfg[key])
    target = cfg[keys[0]] if len(keys) > 1 else cfg
    del target[keys[-1]]
    return cfg


@pytest.mark.parametrize(
    'cfg, error, message',
    [
        (with_group('expert', {}), ValueError, r"optim_wrapper\.expert .*mean 'experts'"),
        (with_group('optimizer', {}), ValueError, r'optim_wrapper\.optimizer .*_delete_=True'),
        (without('router'), ValueError, r'optim_wrapper\.router is missing'),
        (without('router', 'optimizer'), ValueError, r"optim_wrapper\.router has no 'optimizer'"),
        (with_group('router', 'SGD'), TypeError, r"optim_wrapper\.router must be .* got 'SGD'"),
        (with_group('paramwise_cfg', {}), ValueError, r'experts\.paramwise_cfg'),
    ],
)
def test_wrong_configs_are_named(model, cfg, error, message):
    with pytest.raises(error, match=message):
        build_optim_wrapper(model, cfg)


def test_models_that_cannot_take_turns_are_refused():
    dense = MODELS.build(model_cfg(num_experts=1))
    with pytest.raises(ValueError, match='num_experts >= 2 .* plain optim_wrapper'):
        build_optim_wrapper(dense, turns_cfg())
    frozen = Routed()
    frozen.router.requires_grad_(False)
    with pytest.raises(ValueError, match='all parameters of the router are frozen'):
        build_optim_wrapper(frozen, turns_cfg())


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class WeightsOnlyConstructor:
    """Forgets the biases."""

    def __init__(self, optim_wrapper_cfg, paramwise_cfg=None):
        pass

    def __call__(self, model):
        weights = [p for n, p in model.named_parameters() if n.endswith('weight')]
        return OptimWrapper(torch.optim.SGD(weights, lr=0.1))


def test_a_constructor_that_leaves_parameters_out_is_found_out(model):
    cfg = turns_cfg()
    cfg['router']['constructor'] = 'WeightsOnlyConstructor'
    with pytest.raises(ValueError, match=r'in no optimizer \(first: backbone\.router\..*bias'):
        build_optim_wrapper(model, cfg)


@pytest.mark.parametrize(
    'scheduler, message',
    [
        (dict(experts=[]), r'param_scheduler\.router is missing'),
        (dict(experts=[], roter=[]), r"param_scheduler\.roter .*mean 'router'"),
    ],
)
def test_param_schedulers_must_name_both_groups(scheduler, message):
    turns = dict(constructor='AlternatingOptimWrapperConstructor')
    for right in ([dict(type='LinearLR')], dict(type='LinearLR'), dict(experts=[], router=[])):
        check_config(dict(optim_wrapper=turns, param_scheduler=right))
    with pytest.raises(ValueError, match=message):
        check_config(dict(optim_wrapper=turns, param_scheduler=scheduler))


def test_only_the_active_group_steps_and_nothing_leaks_into_the_next_turn():
    model = Routed()
    wrapper = build_optim_wrapper(
        model,
        dict(
            constructor='AlternatingOptimWrapperConstructor',
            experts=dict(optimizer=dict(type='SGD', lr=1.0)),
            router=dict(optimizer=dict(type='SGD', lr=1.0)),
        ),
    )
    body, router = model.body.weight, model.router.weight
    router.grad = torch.full_like(router, 1e6)  # left over from somewhere
    wrapper.activate('experts')
    expected = body.detach() - router.detach()
    wrapper.update_params(model())
    assert body.equal(expected) and router.item() == 1
    assert router.grad is not None  # this backward pass reached the router too ...
    wrapper.activate('router')
    assert router.grad is None and body.grad is None  # ... but its turn starts from nothing
    wrapper.update_params(model())
    assert router.item() == pytest.approx(1 - body.item()) and body.equal(expected)


def test_half_an_update_survives_the_turn_of_the_other_group():
    model = Routed()
    wrapper = build_optim_wrapper(model, turns_cfg(accumulative_counts=2))
    wrapper.activate('experts')
    wrapper.update_params(model())
    half = model.body.weight.grad.clone()
    model.body.weight.requires_grad_(False)
    wrapper.activate('router')
    wrapper.update_params(model())
    wrapper.zero_grad()
    assert model.body.weight.grad.equal(half) and wrapper.active.inner_count == 1


def test_counts_of_each_group_come_from_the_schedule():
    model = Routed()
    cfg = turns_cfg()
    cfg['router']['accumulative_counts'] = 3
    wrapper = build_optim_wrapper(model, cfg)
    with pytest.raises(RuntimeError, match='AlternatingOptimHook'):
        wrapper.initialize_count_status(model, 0, 10)
    wrapper.count_before = TurnSchedule(2, 1, accumulative_counts=wrapper.accumulative_counts).count_before
    wrapper.initialize_count_status(model, 5, 5 + 4)  # e e r r r | e e r r
    counts = {name: (member.inner_count, member._max_counts) for name, member in wrapper.items()}
    assert counts == dict(experts=(2, 4), router=(3, 5))
    wrapper.activate('router')
    # The two iterations left in the last turn are one update, averaged over two.
    scales = []
    for _ in range(2):
        scales.append(wrapper.active.scale_loss(torch.tensor(1.0)).item())
        sync = wrapper.active.should_sync()
        wrapper.active.backward(model())
        assert sync == wrapper.active.should_update()
    assert scales == [0.5, 0.5] and wrapper.active.should_update()


def test_learning_rates_and_gradient_norms_carry_the_name_of_their_group():
    model = Routed()
    wrapper = build_optim_wrapper(model, turns_cfg(clip_grad=dict(max_norm=1.0)))
    assert set(wrapper.get_lr()) == {'experts.lr', 'router.lr'}
    for name in wrapper.keys():
        wrapper.activate(name)
        wrapper.update_params(model())
    scalars = wrapper.active.message_hub.log_scalars
    assert {'train/experts.grad_norm', 'train/router.grad_norm'} <= set(scalars)


def test_state_of_both_groups_round_trips_and_any_other_is_refused():
    model = Routed()
    wrapper = build_optim_wrapper(model, turns_cfg())
    for name in wrapper.keys():
        wrapper.activate(name)
        wrapper.update_params(model())
    other = build_optim_wrapper(model, turns_cfg())
    other.load_state_dict(wrapper.state_dict())
    for name in wrapper.keys():
        (state,) = wrapper[name].optimizer.state.values()
        (loaded,) = other[name].optimizer.state.values()
        assert loaded['momentum_buffer'].equal(state['momentum_buffer'])
    with pytest.raises(ValueError, match=r"holds \['experts'\] instead of"):
        other.load_state_dict(dict(experts=wrapper['experts'].state_dict()))
    with pytest.raises(ValueError, match='load_from without resume'):
        other.load_state_dict(OptimWrapper(torch.optim.SGD(model.parameters(), 0.1)).state_dict())


def test_unknown_group_is_refused():
    wrapper = build_optim_wrapper(Routed(), turns_cfg())
    with pytest.raises(ValueError, match="'rooter' .*did you mean 'router'"):
        wrapper.activate('rooter')


@pytest.mark.skipif(not torch.cuda.is_available(), reason='loss scaling needs a GPU')
def test_each_group_scales_its_own_loss_on_gpu():
    model = Routed().cuda()
    groups = {name: group_cfg(type='AmpOptimWrapper') for name in ('experts', 'router')}
    wrapper = build_optim_wrapper(model, dict(constructor='AlternatingOptimWrapperConstructor', **groups))
    assert isinstance(wrapper, AlternatingOptimWrapper)
    assert all(isinstance(member, AmpOptimWrapper) for member in wrapper.values())
    before = model.body.weight.item(), model.router.weight.item()
    wrapper.activate('router')
    with wrapper.optim_context(model):
        assert torch.is_autocast_enabled()
        loss = model()
    wrapper.update_params(loss)
    assert model.body.weight.item() == before[0] and model.router.weight.item() != before[1]


def test_transformers_train_with_layer_wise_decay_per_group():
    arch = dict(embed_dims=16, num_layers=4, num_heads=2, feedforward_channels=32)
    backbone = dict(
        type='MoEBackbone',
        num_experts=2,
        include=[r'layers\.[13]\.ffn'],
        routing='token',
        backbone=dict(type='VisionTransformer', arch=arch, img_size=8, patch_size=4),
    )
    model = MODELS.build(
        dict(
            type='ImageClassifier',
            backbone=backbone,
            head=dict(type='LinearClsHead', num_classes=4, in_channels=16),
        )
    )
    group = dict(
        constructor='mmpretrain.LearningRateDecayOptimWrapperConstructor',
        optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.05),
        paramwise_cfg=dict(layer_decay_rate=0.5, bias_decay_mult=0.0),
    )
    wrapper = AlternatingOptimWrapperConstructor(dict(experts=group, router=group))(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates, decays = {}, {}
    for member in wrapper.values():
        for part in member.optimizer.param_groups:
            for parameter in part['params']:
                name = names[id(parameter)]
                rates[name], decays[name] = part['lr'], part['weight_decay']
    blocks = {n: [rate for name, rate in rates.items() if f'.network.layers.{n}.' in name] for n in range(4)}
    assert all(len(set(found)) == 1 for found in blocks.values())
    assert [blocks[n + 1][0] / blocks[n][0] for n in range(3)] == [2.0] * 3
    # Experts and gate of a block go with the block; stacked biases are still biases.
    prefix = 'backbone.network.layers.3.ffn.layers'
    assert rates[f'{prefix}.router.weight'] == rates[f'{prefix}.experts.layers.1.weight'] == blocks[3][0]
    assert decays[f'{prefix}.experts.layers.1.weight'] == 0.05 and decays[f'{prefix}.experts.layers.1.bias'] == 0
    assert set(rates) == set(names.values())
