import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from masked_mixture import MaskedMoE
from mmengine.model import PretrainedInit
from mmengine.runner.activation_checkpointing import turn_on_activation_checkpointing
from mmpretrain.registry import MODELS

from mmadvmoe.moe import (
    PLACEMENTS,
    BaseRouting,
    MoEConv2d,
    MoELinear,
    placement_of,
    router_modules,
    split_parameters,
)
from mmadvmoe.moe.placements import map_tensors

RESNET = dict(
    backbone=dict(type='ResNet_CIFAR', depth=18, stem_channels=4, base_channels=4), include=[r'layer\d\.\d\.conv\d']
)
VGG = dict(
    backbone=dict(type='ScaledVGG', depth=11, base_channels=4),
    include=[r'features\.\d+\.conv$'],
    exclude=[r'features\.0\.'],
)
CONVNEXT = dict(
    backbone=dict(type='ConvNeXt', arch=dict(depths=[1, 1, 1, 1], channels=[4, 8, 8, 8]), drop_path_rate=0.0),
    include=['depthwise_conv', 'pointwise_conv'],
)
SMALL_ROUTER = dict(type='ResNetRouter', base_channels=4, num_blocks=1)


def build(network=RESNET, num_experts=3, training=False, **kwargs):
    torch.manual_seed(0)
    if kwargs.get('routing', 'image') == 'image':
        kwargs.setdefault('router', SMALL_ROUTER)
    cfg = dict(type='MoEBackbone', num_experts=num_experts, **copy.deepcopy(network), **kwargs)
    model = MODELS.build(cfg)
    model.init_weights()
    for module in model.modules():  # a residual branch that starts at zero would hide every gradient inside
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    model.train(training)
    spread_routes(model)
    return model


def spread_routes(model):
    """Standardise each router's logits, for routers fresh from initialisation send all images one way."""

    def standardise(router, _, logits):
        router.fc.weight /= logits.std(dim=0).unsqueeze(1)
        router.fc.bias.copy_((router.fc.bias - logits.mean(dim=0)) / logits.std(dim=0))
        return (logits - logits.mean(dim=0)) / logits.std(dim=0)

    hooks = [router.register_forward_hook(standardise) for router in router_modules(model)]
    with torch.no_grad():
        model(images())
    for hook in hooks:
        hook.remove()


def images(batch=8, size=32):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, 3, size, size, generator=generator) * torch.rand(batch, 3, 1, 1, generator=generator)


def projection(features):
    generator = torch.Generator().manual_seed(2)
    return sum((f * torch.randn(f.shape, generator=generator)).sum() for f in features)


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('gate', ['softmax', 'logit'])
@pytest.mark.parametrize('routing', ['image', 'layer'])
@pytest.mark.parametrize('network', [RESNET, VGG, CONVNEXT], ids=['resnet', 'vgg', 'convnext'])
def test_outputs_and_all_gradients_equal_compute_all_and_mask(network, routing, gate, training):
    model = build(network, routing=routing, gate=gate, training=training).double()
    oracle = MaskedMoE(model).double()
    x, x_oracle = images().double().requires_grad_(), images().double().requires_grad_()
    features, expected = model(x), oracle(x_oracle)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(features, expected))
    projection(features).backward()
    projection(expected).backward()
    torch.testing.assert_close(x.grad, x_oracle.grad, rtol=1e-7, atol=1e-9)
    gradients = oracle.named_gradients()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-6, atol=1e-8, msg=name)
    routings = model.forward_routed(x)[1]
    assert any(sum(c > 0 for c in r.counts) > 1 for r in routings), 'the test must use several experts'
    assert any(p.grad.abs().sum() > 0 for r in router_modules(model) for p in r.parameters())


def test_only_the_chosen_expert_is_computed(monkeypatch):
    model = build()
    seen = []
    compute = MoEConv2d.compute
    monkeypatch.setattr(MoEConv2d, 'compute', lambda self, x, *a: seen.append(len(x)) or compute(self, x, *a))
    model(images(batch=8))
    assert sum(seen) == 8 * len(model.expert_layer_names)


def test_an_expert_without_images_has_a_zero_gradient():
    model = build(num_experts=3, training=True)
    route = torch.zeros(4, dtype=torch.long)
    projection(model.forward_routed(images(4), route)[0]).backward()
    for layer in model.expert_layers():
        used, *unused = layer.weight.grad.chunk(3)
        assert used.abs().sum() > 0
        assert all(torch.equal(g, torch.zeros_like(g)) for g in unused)


@pytest.mark.parametrize('routing', ['image', 'layer'])
def test_a_given_route_is_taken_and_hides_the_gate(routing):
    model = build(routing=routing)
    x = images().requires_grad_()
    route = torch.arange(8) % 3
    features, routings = model.forward_routed(x, route)
    assert all(torch.equal(r.expert, route) and r.gate is None and r.logits is None for r in routings)
    # Image by image, the pathway alone: the network with that expert's weights as its own.
    for i in range(8):
        alone = model.forward_routed(x[i : i + 1], route[i : i + 1])[0]
        torch.testing.assert_close(features[0][i], alone[0][0], rtol=1e-4, atol=1e-5)
    projection(features).backward()
    assert all(p.grad is None for r in router_modules(model) for p in r.parameters())
    with_logits = model.forward_routed(x, route, with_logits=True)[1]
    assert all(r.logits.shape == (8, 3) and torch.equal(r.expert, route) for r in with_logits)


def test_layer_routes_can_be_given_one_by_one():
    model = build(routing='layer')
    route = torch.randint(0, 3, (8, model.num_routers), generator=torch.Generator().manual_seed(3))
    routings = model.forward_routed(images(), route)[1]
    assert torch.equal(torch.stack([r.expert for r in routings], dim=1), route)


def test_holding_the_own_route_changes_nothing():
    model = build(routing='layer')
    features, routings = model.forward_routed(images())
    held = torch.stack([r.expert for r in routings], dim=1)
    assert torch.equal(model.forward_routed(images(), held)[0][0], features[0])


def test_one_expert_is_the_plain_backbone():
    model = build(num_experts=1)
    dense = MODELS.build(copy.deepcopy(RESNET['backbone']))
    assert not router_modules(model) and model.num_routers == 0
    assert set(model.network.state_dict()) == set(dense.state_dict())
    dense.load_state_dict(model.network.state_dict())
    dense.eval()
    model.eval()
    assert torch.equal(model(images())[0], dense(images())[0])
    assert model.forward_routed(images())[1] == ()


def test_experts_are_initialised_one_by_one_with_their_own_fan_out():
    wide = dict(RESNET, backbone=dict(RESNET['backbone'], base_channels=32))
    layer = build(wide, num_experts=4).network.layer4[0].conv2
    experts = layer.weight.chunk(4)
    expected = (2 / (256 * 9)) ** 0.5  # He et al., fan-out of one expert
    for expert in experts:
        assert abs(expert.std().item() / expected - 1) < 0.05
    assert not torch.equal(experts[0], experts[1])


def pretrained(tmp_path, before, prefix, channels=4):
    """A dense network, and a mixture that is to begin with it; ``before`` stands in front of its names in the file."""
    dense = MODELS.build(dict(RESNET['backbone'], base_channels=channels))
    dense.init_weights()
    state = {before + k: v for k, v in dense.state_dict().items()}
    torch.save(dict(state_dict=state), tmp_path / 'dense.pth')
    source = dict(type='Pretrained', checkpoint=str(tmp_path / 'dense.pth'), prefix=prefix)
    return dense, dict(RESNET, backbone=dict(RESNET['backbone'], init_cfg=source))


@pytest.mark.parametrize(
    ('before', 'prefix'),
    [('backbone.', 'backbone.'), ('backbone.', None), ('', 'backbone.'), ('module.backbone.', None)],
)
def test_a_dense_checkpoint_is_upcycled_into_every_expert_with_the_prefix_that_it_has(tmp_path, before, prefix):
    dense, network = pretrained(tmp_path, before, prefix)
    plain = MODELS.build(dict(type='MoEBackbone', num_experts=1, **copy.deepcopy(network)))
    plain.init_weights()
    assert plain.network.layer1[0].conv1.weight.equal(dense.layer1[0].conv1.weight)
    model = build(network)
    for name, norm in dense.named_modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.load_state_dict(model.network.get_submodule(name).state_dict())
    dense.eval()
    for expert in range(3):
        features = model.forward_routed(images(), torch.full((8,), expert))[0]
        torch.testing.assert_close(features[0], dense(images())[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('kind', ['mmengine.Pretrained', PretrainedInit])
def test_a_checkpoint_of_the_whole_mixture_is_loaded_by_whatever_name_of_its_initialiser(tmp_path, kind):
    source = build()
    torch.save(source.state_dict(), tmp_path / 'moe.pth')
    model = build(init_cfg=dict(type=kind, checkpoint=str(tmp_path / 'moe.pth')))
    assert model.expert_layers()[0].weight.equal(source.expert_layers()[0].weight)


@pytest.mark.parametrize(
    ('before', 'channels', 'message'),
    [('model.', 4, r'there is model\.layer1\.0\.conv1'), ('', 8, r'wanted, there is .*conv1\.weight \(8, 4, 3, 3\)')],
)
def test_a_checkpoint_without_a_layer_that_gets_experts_is_refused(tmp_path, before, channels, message):
    _, network = pretrained(tmp_path, before, None, channels)
    with pytest.raises(ValueError, match=rf'no layer that gets experts is in .*{message}.*init_cfg=dict'):
        build(network)


def test_parameters_are_split_without_rest_or_overlap():
    for routing in ('image', 'layer'):
        model = build(routing=routing)
        groups = {k: {n for n, _ in v} for k, v in split_parameters(model).items()}
        assert groups['experts'] | groups['router'] == {n for n, _ in model.named_parameters()}
        assert not groups['experts'] & groups['router']
        assert all(('router' in n.split('.')) for n in groups['router'])
        assert not any(('router' in n.split('.')) for n in groups['experts'])


def test_several_outputs_come_back_in_the_order_of_the_batch():
    network = dict(RESNET, backbone=dict(RESNET['backbone'], out_indices=(0, 1, 2, 3)))
    model = build(network)
    together = model(images())
    assert len(together) == 4
    for i in range(8):
        for whole, alone in zip(together, model(images()[i : i + 1])):
            torch.testing.assert_close(whole[i], alone[0], rtol=1e-4, atol=1e-5)


def test_a_deep_copy_is_independent():
    model = build()
    clone = copy.deepcopy(model)
    assert clone.context is clone.network.layer1[0].conv1.context is not model.context
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert clone(images())[0].abs().sum() > 0


def test_an_error_inside_the_forward_pass_leaves_the_backbone_usable():
    model = build()
    with pytest.raises(ValueError, match=r'router\.in_channels=3, but images have 5 channels'):
        model(torch.rand(2, 5, 32, 32))
    assert model(images())[0].shape[0] == 8


def test_expert_layers_of_convnext_are_convolutions_and_linear_layers():
    kinds = {type(layer) for layer in build(CONVNEXT).expert_layers()}
    assert kinds == {MoEConv2d, MoELinear}


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(num_experts=0), 'num_experts=0'),
        (dict(num_experts=2.0), 'num_experts=2.0'),
        (dict(include=['block9']), r"pattern 'block9' matches no layer.*layer1\.0\.conv1"),
        (dict(include=[r'layer1\.0']), r'layer1.0.bn1.*BatchNorm2d.*cannot hold experts'),
        (dict(include=['conv']), "stem 'conv1'"),
        (dict(include=['conv(']), r'no regular expression'),
        (dict(include='conv'), 'list'),
        (dict(routing='layers'), "did you mean 'layer'"),
        (dict(gate='soft'), "gate='soft'"),
        (
            dict(routing='layer', router=dict(type='ResNetRouter')),
            r"ResNetRouter reads images, but .*each of 16 layers.*_delete_=True, type='LayerRouter'",
        ),
        (dict(routing='layer', router=dict(type='MLPRouter', image_size=8)), 'MLPRouter reads images'),
        (dict(routing='layer', router=dict(type='ConvRouter', image_size=8)), 'ConvRouter reads images'),
        (dict(router=dict(type='ResNetRouter', num_experts=2)), 'router.num_experts=2.*num_experts=3'),
        (
            dict(init_cfg=dict(type='Kaiming', layer='Conv2d')),
            r'backbone.init_cfg=.*Kaiming.*backbone.backbone.init_cfg',
        ),
        (
            dict(init_cfg=dict(checkpoint='moe.pth')),
            'backbone.init_cfg=.*moe.pth',
        ),
    ],
)
def test_mistakes_are_named(change, message):
    cfg = dict(type='MoEBackbone', num_experts=3, **copy.deepcopy(RESNET))
    with pytest.raises(ValueError, match=message):
        MODELS.build({**cfg, **change})


@pytest.mark.parametrize('routing', ['image', 'layer', 'token'])
def test_activations_are_not_computed_anew_by_other_routes(routing):
    model = token_mixture() if routing == 'token' else build(routing=routing)
    block = 'network.layers.0' if routing == 'token' else 'network.layer1'
    turn_on_activation_checkpointing(model, block)
    x = torch.rand(4, 3, 8, 8) if routing == 'token' else images(4)
    loss = projection(model.forward_routed(x.requires_grad_(), torch.tensor([0, 1, 2, 1]))[0])
    with pytest.raises(RuntimeError, match='routes are those of that pass; leave out .*activation_checkpointing'):
        loss.backward()


@pytest.mark.parametrize(
    'backbone',
    [
        dict(RESNET['backbone'], with_cp=True),
        dict(type='DenseNet', arch=dict(growth_rate=2, depths=[1, 1], init_channels=4), memory_efficient=True),
    ],
)
def test_checkpointing_that_a_backbone_brings_is_refused_by_its_key(backbone):
    cfg = dict(type='MoEBackbone', num_experts=2, include=['conv2'], backbone=backbone)
    with pytest.raises(ValueError, match=r'backbone\.backbone\.(with_cp|memory_efficient)=False'):
        MODELS.build(cfg)
    MODELS.build(dict(cfg, num_experts=1))


def test_a_bad_route_is_named():
    model = build()
    with pytest.raises(ValueError, match=r'experts in \[0, 3\)'):
        model.forward_routed(images(), torch.full((8,), 3))
    with pytest.raises(ValueError, match='shape'):
        model.forward_routed(images(), torch.zeros(8, 2, dtype=torch.long))
    for short in (torch.zeros(2, dtype=torch.long), torch.tensor(0)):
        with pytest.raises(ValueError, match=r'for B=8 images, got \((2,)?\)'):
            model.forward_routed(images(), short)


@pytest.mark.parametrize('routing', ['image', 'layer', 'token'])
def test_no_images_give_no_features(routing):
    model = token_mixture() if routing == 'token' else build(routing=routing)
    x = images(2)[:, :, :8, :8]
    shape, nothing = model(x)[0].shape, x[:0].requires_grad_()
    features, routings = model.forward_routed(nothing)
    assert features[0].shape == (0, *shape[1:]) and not any(len(routing.expert) for routing in routings)
    (grad,) = torch.autograd.grad(features[0].sum(), nothing)
    assert grad.shape == nothing.shape


def test_an_expert_layer_outside_its_backbone_says_so():
    with pytest.raises(RuntimeError, match='inside the forward pass'):
        build().network.layer1[0].conv1(torch.rand(1, 4, 8, 8))


@pytest.mark.parametrize('routing', ['image', 'layer'])
@pytest.mark.parametrize('routed', [[0, 0, 0, 0], [2, 0, 1, 0]], ids=['one expert', 'several'])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'nhwc'])
def test_the_layout_of_the_gradient_does_not_depend_on_the_routes(routing, routed, layout):
    model = build(routing=routing).requires_grad_(False)
    x = images(4).to(memory_format=layout).requires_grad_()
    for route in (None, torch.tensor(routed)):
        (gradient,) = torch.autograd.grad(projection(model.forward_routed(x, route)[0]), x)
        assert gradient.is_contiguous()


def test_a_backbone_inside_itself_is_refused_and_usable_afterwards():
    model = build()
    model.network.layer1[0].register_forward_hook(lambda *_: model(images()))
    with pytest.raises(RuntimeError, match='entered again from inside its own forward pass'):
        model(images())
    with pytest.raises(RuntimeError, match='inside the forward pass'):
        model.network.layer1[0].conv1(torch.rand(1, 4, 8, 8))


def test_a_copy_and_a_pickle_made_inside_a_forward_pass_have_none_under_way():
    model = build()
    made = []
    hook = model.network.layer1[0].register_forward_hook(
        lambda *_: made.extend([copy.deepcopy(model.context), pickle.loads(pickle.dumps(model.context))])
    )
    model(images())
    hook.remove()
    for context in made:
        assert (context.num_experts, context.gate) == (3, 'softmax')
        with pytest.raises(RuntimeError, match='inside the forward pass'):
            _ = context.running
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(images())[0], model(images())[0])


@pytest.mark.parametrize('routing', PLACEMENTS)
def test_threads_do_not_see_each_others_routes(routing):
    model = token_mixture() if routing == 'token' else build(routing=routing)
    inputs = [images(6, size=32 if routing != 'token' else 8) * scale for scale in (1.0, 0.9, 0.8, 0.7)]
    routes = [None, *(torch.full((6,), expert) for expert in range(model.num_experts - 1)), torch.arange(6) % 3]
    calls = [(x, route) for x in inputs for route in routes] * 4
    with torch.no_grad():
        expected = [measured(model, *call) for call in calls[: len(inputs) * len(routes)]] * 4

        def run(call):
            with torch.no_grad():  # a setting of the thread
                return measured(model, *call)

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(run, calls))
    for ours, theirs in zip(found, expected):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def measured(model, x, route):
    """The last features, and what the routers decided."""
    if route is None:
        return (model(x)[-1],)
    features, routings = model.forward_routed(x, route)
    return features[-1], *(routing.decisions for routing in routings)


def token_mixture():
    torch.manual_seed(0)
    arch = dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=24)
    vit = dict(type='VisionTransformer', arch=arch, img_size=8, patch_size=4)
    model = MODELS.build(dict(type='MoEBackbone', num_experts=3, routing='token', include=['ffn'], backbone=vit))
    for router in router_modules(model):
        torch.nn.init.normal_(router.weight)
    model.eval()
    return model


def test_a_placement_says_what_others_ask_of_it():
    image, layer, token = build(), build(routing='layer'), token_mixture()
    assert image.placement.router_names == ('router',) and image.placement.one_route_per_image
    assert layer.placement.router_names == layer.expert_layer_names and not layer.placement.one_route_per_image
    assert token.placement.router_names == ('layers.0.ffn', 'layers.1.ffn') and token.placement.reads_tokens
    assert [model.placement.name for model in (image, layer, token)] == list(PLACEMENTS)
    for dense in (torch.nn.Identity(), torch.nn.Sequential()):
        assert placement_of(dense).name is None and placement_of(dense).router_names == ()


@pytest.mark.parametrize('routing', PLACEMENTS)
def test_every_routing_says_what_consumers_read(routing):
    model = token_mixture() if routing == 'token' else build(routing=routing)
    x = images(4, size=8 if routing == 'token' else 32)
    tokens = 5 if routing == 'token' else 1
    for routing in model.forward_routed(x)[1]:
        assert isinstance(routing, BaseRouting)
        assert routing.token_logits.shape == (4, tokens, 3)
        assert routing.decisions.shape == (4, tokens * routing.top_k)
        assert routing.followed.shape == (4, tokens) and routing.followed.all()
        assert routing.num_experts == len(routing.counts) == 3 and sum(routing.counts) == routing.decisions.numel()
        assert (routing.dropped, routing.noise_std) == (0, 0.0)
        assert not routing.detach().logits.requires_grad


SWIN = dict(
    type='SwinTransformer',
    arch=dict(embed_dims=8, depths=[1, 1], num_heads=[1, 1]),
    img_size=16,
    patch_size=2,
    window_size=4,
    out_indices=(1,),
)


@pytest.mark.parametrize('routing', ['image', 'layer'])
def test_a_layer_that_is_given_windows_is_named(routing):
    cfg = dict(type='MoEBackbone', num_experts=2, routing=routing, backbone=SWIN)
    if routing == 'image':
        cfg['router'] = SMALL_ROUTER
    model = MODELS.build(copy.deepcopy(dict(cfg, include=['qkv']))).eval()
    with pytest.raises(ValueError, match=r"'stages\.0\.blocks\.0\.attn\.w_msa\.qkv' is given 8 rows for 2 images"):
        model(images(2, 16))
    fine = MODELS.build(copy.deepcopy(dict(cfg, include=[r'stages.*ffn\.layers\.(0\.0|1)$']))).eval()
    assert len(fine(images(2, 16))[0]) == 2


def test_an_output_of_training_alone_stays_none():
    aux, features = map_tensors(torch.neg, (None, torch.ones(2)))
    assert aux is None and features.equal(-torch.ones(2))


def test_norm_eval_holds_for_routers_too():
    for routing in ('image', 'layer'):
        network = dict(RESNET, backbone=dict(RESNET['backbone'], norm_eval=True))
        model = build(network, routing=routing, router=SMALL_ROUTER if routing == 'image' else None).train()
        norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        assert norms and not any(norm.training for norm in norms)
        assert model.training and all(router.training for router in router_modules(model))


@MODELS.register_module()
class PlainModule(torch.nn.Module):
    """A backbone of somebody who does not know MMEngine's ``BaseModule``."""

    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 3, 3, padding=1)
        self.conv2 = torch.nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return (self.conv2(self.conv1(x)),)


def test_a_plain_module_may_be_a_backbone():
    model = build(dict(backbone=dict(type='PlainModule'), include=['conv2']))
    assert model(torch.rand(2, 3, 8, 8))[0].shape == (2, 3, 8, 8)
