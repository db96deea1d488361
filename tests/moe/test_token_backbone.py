import copy

import pytest
import torch
from mmpretrain.registry import MODELS
from token_oracle import SlowMoE

from mmadvmoe.moe import ExpertFFN, router_modules, split_parameters

ARCH = dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=24)
VIT = dict(backbone=dict(type='VisionTransformer', arch=ARCH, img_size=8, patch_size=4), include=['ffn'], size=8)
DEIT3 = dict(backbone=dict(type='DeiT3', arch=ARCH, img_size=8, patch_size=4), include=['ffn'], size=8)
SWIN = dict(
    backbone=dict(
        type='SwinTransformer',
        arch=dict(embed_dims=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2]),
        img_size=32,
        window_size=2,
        pad_small_map=True,
        drop_path_rate=0.0,
    ),
    include=[r'stages\.[12]'],
    size=32,
)
CONVNEXT = dict(
    backbone=dict(type='ConvNeXt', arch=dict(depths=[1, 1, 1, 1], channels=[4, 8, 8, 8]), drop_path_rate=0.0),
    include=[r'stages\.[23]'],
    size=32,
)
NETWORKS = dict(vit=VIT, deit3=DEIT3, swin=SWIN, convnext=CONVNEXT)


def config(network=VIT, num_experts=4, **router):
    cfg = {key: copy.deepcopy(network[key]) for key in ('backbone', 'include')}
    return dict(
        type='MoEBackbone', num_experts=num_experts, routing='token', router=dict(type='TokenRouter', **router), **cfg
    )


def build(network=VIT, num_experts=4, training=False, **router):
    torch.manual_seed(0)
    model = MODELS.build(config(network, num_experts, **router))
    model.init_weights()
    for name, parameter in model.named_parameters():
        if 'gamma' in name:  # layer scale starts near zero and would hide every gradient inside
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    for module in router_modules(model):
        torch.nn.init.normal_(module.weight)
    model.train(training)
    return model


def images(batch=3, size=8, seed=1):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def projection(features):
    generator = torch.Generator().manual_seed(2)
    return sum((f * torch.randn(f.shape, generator=generator)).sum() for f in features)


def assert_same(model, oracle, x, tolerance):
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    for network, point in ((model, ours), (oracle, theirs)):
        projection(network(point)).backward()
    for a, b in zip(model(x), oracle(x)):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    scale = theirs.grad.abs().max()
    torch.testing.assert_close(ours.grad / scale, theirs.grad / scale, rtol=tolerance, atol=tolerance)
    gradients = oracle.named_gradients()
    for name, parameter in model.named_parameters():
        if gradients[name] is None:  # of DeiT3's norm layers that it does not use; of experts that the loop never met
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        scale = gradients[name].abs().max().clamp(min=1e-12)
        difference = (parameter.grad - gradients[name]).abs().max() / scale
        assert difference <= 10 * tolerance, (name, difference)


DROPS = dict(capacity_factor=0.75, eval_capacity_factor=0.75)


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('drops', [{}, DROPS], ids=['all', 'drops'])
@pytest.mark.parametrize('softmax', ['before', 'after'])
@pytest.mark.parametrize('top_k', [1, 2])
def test_outputs_and_all_gradients_equal_a_loop_over_tokens(top_k, softmax, drops, training):
    model = build(top_k=top_k, softmax=softmax, training=training, **drops).double()
    routings = model.forward_routed(images().double())[1]
    assert all(sum(count > 0 for count in routing.counts) > 1 for routing in routings)
    assert any(routing.dropped for routing in routings) == bool(drops)
    assert_same(model, SlowMoE(model), images().double(), 1e-9)
    assert all(router.weight.grad.abs().sum() > 0 for router in router_modules(model))


@pytest.mark.parametrize('network', ['deit3', 'swin', 'convnext'])
def test_other_networks_equal_a_loop_over_tokens(network):
    model = build(NETWORKS[network], top_k=2).double()
    assert len(model.forward_routed(images(size=NETWORKS[network]['size']).double())[1]) == 2
    assert_same(model, SlowMoE(model), images(size=NETWORKS[network]['size']).double(), 1e-8)


@pytest.mark.parametrize('top_k', [1, 2])
def test_single_precision_equals_a_loop_over_tokens(top_k):
    model = build(top_k=top_k, training=True, **DROPS)
    assert_same(model, SlowMoE(model), images(), 1e-4)


@pytest.mark.parametrize('top_k', [1, 2])
@pytest.mark.parametrize('drops', [{}, DROPS], ids=['all', 'drops'])
def test_a_layer_in_bfloat16_equals_a_loop_over_tokens(top_k, drops):
    # One layer: behind it the two forms would route tokens that differ by rounding.
    network = dict(VIT, include=[r'layers\.0\.ffn'])
    model = build(network, top_k=top_k, training=True, **drops)
    oracle = SlowMoE(model)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        routing = model.forward_routed(images())[1][0]
        assert routing.logits.dtype == torch.float32
        assert_same(model, oracle, images(), 3e-2)


def test_one_expert_is_the_plain_backbone():
    model = build(num_experts=1)
    dense = MODELS.build(copy.deepcopy(VIT['backbone']))
    dense.eval()
    assert not router_modules(model) and model.num_routers == 0
    dense.load_state_dict(model.network.state_dict())
    assert torch.equal(model(images())[0], dense(images())[0])


@pytest.mark.parametrize('network', NETWORKS)
@pytest.mark.parametrize('top_k', [1, 3])
def test_an_upcycled_network_computes_what_its_dense_source_does(network, top_k, tmp_path):
    torch.manual_seed(3)
    network = NETWORKS[network]
    dense = MODELS.build(copy.deepcopy(network['backbone']))
    dense.init_weights()
    for name, parameter in dense.named_parameters():
        if 'gamma' in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    torch.save(dict(state_dict={f'backbone.{k}': v for k, v in dense.state_dict().items()}), tmp_path / 'dense.pth')
    source = dict(type='Pretrained', checkpoint=str(tmp_path / 'dense.pth'), prefix='backbone.')
    upcycled = dict(network, backbone=dict(network['backbone'], init_cfg=source))
    model = MODELS.build(config(upcycled, top_k=top_k))
    model.init_weights()
    dense.eval()
    model.eval()
    x = images(size=network['size'])
    features, routings = model.forward_routed(x)
    assert any(sum(count > 0 for count in routing.counts) > 1 for routing in routings)
    torch.testing.assert_close(features[0], dense(x)[0], rtol=1e-5, atol=1e-5)


def test_experts_are_drawn_one_by_one():
    layer = build().expert_layers()[0]
    first, second = (layer.expert_parameters(n)['layers.0.0.weight'] for n in (0, 1))
    assert first.shape == (24, 16) and not torch.equal(first, second)
    bound = (6 / (16 + 24)) ** 0.5  # Xavier, with the fans of one expert
    assert 0.9 * bound < first.abs().max() <= bound


@pytest.mark.parametrize('capacity', [None, 0.5])
@pytest.mark.parametrize('top_k', [1, 2])
def test_no_image_depends_on_the_others_in_its_test_batch(top_k, capacity):
    # In training the capacity is that of the batch; that must not leak into evaluation.
    model = build(top_k=top_k, noise=1.0, capacity_factor=0.25, eval_capacity_factor=capacity).double()
    pool = images(40).double()
    with torch.no_grad():
        alone = torch.cat([model(image[None])[0] for image in pool])
        assert any(routing.dropped for routing in model.forward_routed(pool)[1]) == (capacity is not None)
        generator = torch.Generator().manual_seed(5)
        for _ in range(100):
            size = int(torch.randint(2, 17, (), generator=generator))
            batch = torch.randperm(len(pool), generator=generator)[:size]
            torch.testing.assert_close(model(pool[batch])[0], alone[batch], rtol=1e-9, atol=1e-9)


def test_noise_is_drawn_in_training_mode_of_the_router_alone():
    model = build(noise=4.0)
    assert torch.equal(model(images())[0], model(images())[0])
    for router in router_modules(model):
        router.train()
    assert not torch.equal(model(images())[0], model(images())[0])
    model.train()
    for router in router_modules(model):
        router.eval()
    assert torch.equal(model(images())[0], model(images())[0])


@pytest.mark.parametrize('drops', [{}, DROPS], ids=['all', 'drops'])
@pytest.mark.parametrize('softmax', ['before', 'after'])
@pytest.mark.parametrize('top_k', [1, 2])
def test_holding_the_own_route_changes_nothing(top_k, softmax, drops):
    model = build(top_k=top_k, softmax=softmax, **drops)
    features, routings = model.forward_routed(images())
    assert any(routing.dropped for routing in routings) == bool(drops)
    held = torch.cat([routing.decisions for routing in routings], dim=1)
    assert held.shape == (3, 2 * 5 * top_k)
    again, held_routings = model.forward_routed(images(), held)
    torch.testing.assert_close(again[0], features[0])
    # The decisions of an earlier pass, and of some of its images.
    torch.testing.assert_close(model.forward_routed(images(), routings)[0][0], features[0])
    some = tuple(routing.take(torch.tensor([2, 0])) for routing in routings)
    torch.testing.assert_close(model.forward_routed(images()[[2, 0]], some)[0][0], features[0][[2, 0]])
    assert all(routing.followed.all() for routing in held_routings)


def test_a_held_constant_gate_has_no_gradient_and_a_weight_has_its_own():
    for top_k, moved in ((1, False), (2, True)):
        model = build(top_k=top_k)
        held = torch.cat([routing.decisions for routing in model.forward_routed(images())[1]], dim=1)
        for kwargs in (dict(route=held), dict(gated=False)):
            model.zero_grad()
            projection(model.forward_routed(images(), **kwargs)[0]).backward()
            gradients = [router.weight.grad for router in router_modules(model)]
            assert any(g is not None and g.abs().sum() > 1e-9 for g in gradients) == moved


@pytest.mark.parametrize('top_k', [1, 2])
def test_an_expert_can_be_forced_on_all_tokens_of_an_image(top_k):
    model = build(top_k=top_k)
    forced = torch.tensor([3, 0, 2])
    own = model.forward_routed(images())[1]
    for before, routing in zip(own, model.forward_routed(images(), forced)[1]):
        assert (routing.expert == forced[:, None, None]).any(-1).all()
        assert routing.expert.shape == (3, 5, top_k)
        if before is own[0]:  # later layers see other tokens
            # A token that takes the expert anyway keeps its set.
            has_it = (before.expert == forced[:, None, None]).any(-1)
            assert torch.equal(routing.followed, has_it)


def test_another_image_size_than_in_training_is_served():
    model = build()
    routings = model.forward_routed(images(size=16))[1]
    assert routings[0].logits.shape == (3, 17, 4)
    held = torch.cat([routing.decisions for routing in routings], dim=1)
    with pytest.raises(ValueError, match='another image size'):
        model.forward_routed(images(size=8), held[:, :8])
    with pytest.raises(ValueError, match=r'34 columns.*10'):
        model.forward_routed(images(size=8), held)


def test_all_gates_are_router_parameters_and_nothing_else_is():
    groups = {key: {name for name, _ in value} for key, value in split_parameters(build()).items()}
    assert groups['router'] == {f'network.layers.{i}.ffn.layers.router.weight' for i in (0, 1)}


def test_an_expert_without_tokens_has_a_zero_gradient():
    model = build(training=True)
    projection(model.forward_routed(images(), torch.zeros(3, dtype=torch.long))[0]).backward()
    for layer in model.expert_layers():
        for parameter in layer.experts.parameters():
            used, *unused = parameter.grad.chunk(4)
            assert used.abs().sum() > 0 and not any(part.any() for part in unused)


def test_a_deep_copy_is_independent():
    model = build()
    clone = copy.deepcopy(model)
    assert all(layer.context is clone.context is not model.context for layer in clone.expert_layers())
    assert all(isinstance(layer, ExpertFFN) for layer in clone.expert_layers())


RESNET = dict(backbone=dict(type='ResNet_CIFAR', depth=18, base_channels=4), include=['conv'])


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(router=dict(type='TokenRouter', top_k=5)), r'top_k=5 .*\[1, 4\].*num_experts=4'),
        (dict(router=dict(type='TokenRouter', top_k=0)), 'top_k=0'),
        (dict(router=dict(type='TokenRouter', capacity_factor=0.0)), 'router.capacity_factor=0.0'),
        (dict(router=dict(type='TokenRouter', eval_capacity_factor=-1)), 'router.eval_capacity_factor=-1'),
        (dict(router=dict(type='TokenRouter', noise=-1.0)), 'router.noise=-1.0'),
        (dict(router=dict(type='TokenRouter', softmax='both')), "router.softmax='both'.*before.*after"),
        (dict(include=[r'layers\.7\.ffn']), r'layers\\\\.7\\\\.ffn.*no feed-forward network.*layers\.0\.ffn'),
        (dict(include=['ffn'], exclude=['layers']), "'ffn' matches no feed-forward network"),
        (RESNET, "routing='token' routes the tokens of feed-forward networks, and ResNet_CIFAR has none"),
        (dict(RESNET, routing='layer', include=['layer1.0.conv']), r"TokenRouter scores.*routing='layer'.*LayerRouter"),
        (dict(RESNET, routing='image', include=['layer1.0.conv']), "TokenRouter scores.*routing='image'.*ResNetRouter"),
        (dict(router=dict(type='ResNetRouter')), "ResNetRouter does not score.*routing='token'.*TokenRouter"),
        (dict(gate='logit'), "gate='logit' is not for routing='token'"),
        (dict(backbone=dict(CONVNEXT['backbone'], use_grn=True), include=[r'stages\.2']), 'use_grn=False'),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build({**config(), **change})


def test_a_bad_route_is_named():
    model = build(top_k=2)
    with pytest.raises(ValueError, match=r'\[0, 4\)'):
        model.forward_routed(images(), torch.tensor([0, 1, 4]))
    with pytest.raises(ValueError, match='different experts'):
        model.forward_routed(images(), torch.zeros(3, 20, dtype=torch.long))


def test_an_expert_layer_outside_its_backbone_says_so():
    with pytest.raises(RuntimeError, match='inside the forward pass'):
        build().network.layers[0].ffn(torch.rand(1, 5, 16))
