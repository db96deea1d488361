"""Mixtures of all placements on a GPU: against the plain forms, against the CPU, in other types and layouts."""

import copy

import pytest
import torch
from masked_mixture import MaskedMoE
from mmpretrain.registry import MODELS
from small_mixtures import random_mixture
from token_oracle import SlowMoE

from mmadvmoe.attacks import Pathway, Victim
from mmadvmoe.moe import PLACEMENTS, router_modules
from mmadvmoe.moe.token_routing import GroupSizes, grouped_linear


def images(device, batch=8, seed=1):
    return torch.rand(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).to(device)


def mixture(routing, device, num_experts=3):
    """A backbone in eval mode whose routes are spread; weights and routes are those of the CPU."""
    return random_mixture(routing, num_experts).classifier.backbone.to(device)


def weights(features):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(f.shape, generator=generator).to(f.device) for f in features]


def projection(features):
    return sum((f.float() * w).sum() for f, w in zip(features, weights(features)))


def gradients(model, x):
    """Features, and the gradients of images and parameters."""
    x = x.clone().requires_grad_()
    features = model(x)
    projection(features).backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return features, x.grad, named


def assert_close(ours, theirs, tolerance):
    """Close in the scale of the largest value."""
    scale = theirs.abs().max().clamp(min=1e-6).float()
    torch.testing.assert_close(ours.float() / scale, theirs.float() / scale, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('routing', ['image', 'layer'])
def test_outputs_and_gradients_equal_compute_all_and_mask(device, routing, training):
    model = mixture(routing, device)
    model.train(training)
    oracle = MaskedMoE(model)
    ours, theirs = gradients(model, images(device)), gradients(oracle, images(device))
    for a, b in zip(ours[0], theirs[0]):
        assert_close(a, b, 1e-4)
    assert_close(ours[1], theirs[1], 1e-3)
    named = oracle.named_gradients()
    for name, gradient in ours[2].items():
        assert_close(gradient, named[name], 1e-3)


@pytest.mark.parametrize('routing', ['image', 'layer'])
def test_half_precision_is_near_compute_all_and_mask(device, routing):
    """Routes are those of float32, held: a rounded logit may send an image elsewhere."""
    model = mixture(routing, device)
    x = images(device)
    with torch.no_grad():
        features, routings = model.forward_routed(x)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            half, _ = model.forward_routed(x, routings)
    for a, b in zip(half, features):
        assert_close(a, b, 5e-2)


@pytest.mark.parametrize('top_k', [1, 2])
def test_tokens_equal_a_loop_over_tokens(device, top_k):
    model = mixture('token', device)
    for router in router_modules(model):
        router.top_k = top_k
    oracle = SlowMoE(model)
    ours, theirs = gradients(model, images(device, 3)), gradients(oracle, images(device, 3))
    assert_close(ours[0][0], theirs[0][0], 1e-4)
    assert_close(ours[1], theirs[1], 1e-3)


@pytest.mark.parametrize('settings', [dict(capacity_factor=0.5), dict(eval_capacity_factor=0.5)], ids=['train', 'eval'])
def test_tokens_within_a_capacity_equal_a_loop_over_tokens(device, settings):
    model = mixture('token', device)
    model.train('capacity_factor' in settings)
    for router in router_modules(model):
        for key, value in settings.items():
            setattr(router, key, value)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        assert_close(model(images(device, 3))[0], SlowMoE(model)(images(device, 3))[0], 1e-4)


def test_tokens_in_half_precision_are_near_those_in_full(device):
    """On a GPU of capability 9.0 that is the grouped kernel."""
    model = mixture('token', device)
    with torch.no_grad():
        features, routings = model.forward_routed(images(device))
        with torch.autocast(device.type, dtype=torch.bfloat16):
            half, _ = model.forward_routed(images(device), routings)
    assert_close(half[0], features[0], 5e-2)


@pytest.mark.parametrize('bias', [True, False])
def test_gradients_of_the_products_of_experts_in_half_precision(device, bias):
    """On a GPU of capability 9.0 those of the grouped kernel; of an expert without tokens they are zero."""
    load, generator = torch.tensor([5, 0, 3, 8]), torch.Generator().manual_seed(0)
    shapes = [(16, 8), (4 * 24, 8), (4 * 24,)][: 2 + bias]
    exact = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    ours = [each.detach().to(device, torch.bfloat16).requires_grad_() for each in exact]
    out = grouped_linear(*ours, *[None] * (not bias), GroupSizes(load.to(device)))
    biases = exact[2].chunk(4) if bias else [None] * 4
    parts = zip(exact[0].split(load.tolist()), exact[1].chunk(4), biases)
    expected = torch.cat([torch.nn.functional.linear(*part) for part in parts])
    seed = torch.randn(out.shape, generator=generator)
    out.backward(seed.to(out))
    expected.backward(seed)
    assert_close(out.float().cpu(), expected, 5e-2)
    for mine, reference in zip(ours, exact):
        assert_close(mine.grad.float().cpu(), reference.grad, 5e-2)
    assert not ours[1].grad[24:48].any()


@pytest.mark.parametrize('routing', PLACEMENTS)
def test_features_and_gradients_are_those_of_the_cpu(device, routing):
    model = mixture(routing, 'cpu')
    ours = gradients(copy.deepcopy(model).to(device), images(device))
    theirs = gradients(model, images('cpu'))
    assert_close(ours[0][0].cpu(), theirs[0][0], 1e-4)
    assert_close(ours[1].cpu(), theirs[1], 1e-3)
    for name, gradient in ours[2].items():
        assert_close(gradient.cpu(), theirs[2][name], 1e-3)


@pytest.mark.parametrize('routing', PLACEMENTS)
def test_routes_are_those_of_the_cpu(device, routing):
    model = mixture(routing, 'cpu')
    with torch.no_grad():
        theirs = model.forward_routed(images('cpu', 32))[1]
        ours = model.to(device).forward_routed(images(device, 32))[1]
    same = torch.cat([(a.decisions.cpu() == b.decisions).flatten().float() for a, b in zip(ours, theirs)])
    assert same.mean() > 0.99
    assert all(sum(routing.counts) == routing.decisions.numel() for routing in ours)


@pytest.mark.parametrize('routing', PLACEMENTS)
def test_given_and_held_routes(device, routing):
    model = mixture(routing, device)
    x = images(device)
    route = torch.arange(8, device=device) % 3
    with torch.no_grad():
        forced = model.forward_routed(x, route)[0][0]
        for expert in range(3):
            rows = (route == expert).nonzero().squeeze(1)
            alone = model.forward_routed(x[rows], route[rows])[0][0]
            assert_close(forced[rows], alone, 1e-4)
        features, routings = model.forward_routed(x)
        given = torch.cat([r.decisions for r in routings], dim=1)
        assert_close(model.forward_routed(x, given)[0][0], features[0], 1e-5)
        assert_close(model.forward_routed(x, routings)[0][0], features[0], 1e-5)


@pytest.mark.parametrize('routing', PLACEMENTS)
def test_a_held_route_never_makes_the_host_wait(device, routing, no_waiting):
    model = mixture(routing, device).requires_grad_(False)
    x = images(device)
    _, routings = model.forward_routed(x)
    held = tuple(r.detach() for r in routings)
    model.forward_routed(x, held)  # kernels are loaded, which may wait
    points = x.clone().requires_grad_()
    with no_waiting:
        features, _ = model.forward_routed(points, held)
        (grad,) = torch.autograd.grad(sum(f.sum() for f in features), points)
    assert grad.shape == x.shape


def test_an_image_routed_pass_makes_the_host_wait_once(device):
    model = mixture('image', device)
    x = images(device)
    model(x)
    if device.type == 'cuda':
        import warnings

        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode('warn')
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter('always')
                model(x)
        finally:
            torch.cuda.set_sync_debug_mode('default')
        assert len([w for w in caught if 'synchron' in str(w.message)]) == 1
    else:
        from host_reads import HostReads

        with HostReads() as reads:
            model(x)
        assert len(reads) == 1


@pytest.mark.parametrize('routing', ['image', 'layer'])
def test_channels_last_gives_the_same(device, routing):
    # On a CPU, training in this layout was seen to corrupt the heap.
    model = mixture(routing, device).requires_grad_(device.type != 'cpu')
    plain = gradients(model, images(device))
    model.zero_grad()
    model = model.to(memory_format=torch.channels_last)
    ours = gradients(model, images(device).contiguous(memory_format=torch.channels_last))
    assert_close(ours[0][0], plain[0][0], 1e-4)
    assert_close(ours[1], plain[1], 1e-3)


def test_tf32_is_near(device, tf32):
    model = mixture('image', device)
    with torch.no_grad():
        features, routings = model.forward_routed(images(device))
        tf32()
        rounded, _ = model.forward_routed(images(device), routings)
    assert_close(rounded[0], features[0], 1e-2)


@pytest.mark.parametrize('part', ['router', 'pathway'])
def test_compiled_parts_give_the_same(device, part):
    victim = random_mixture('image')
    victim.model.to(device).requires_grad_(False)
    x = images(device)
    module = victim.classifier.backbone.router if part == 'router' else Pathway(victim, 1)
    compiled = torch.compile(module, backend='inductor' if device.type == 'cuda' else 'eager', fullgraph=False)
    with torch.no_grad():
        assert_close(compiled(x), module(x), 1e-3)


def test_a_model_moves_to_the_device_and_back(device):
    victim = random_mixture('image')
    with torch.no_grad():
        before = victim(images('cpu'))
        victim.model.to(device)
        assert victim(images(device)).device.type == device.type
        victim.model.to('cpu')
        assert torch.equal(victim(images('cpu')), before)


def test_a_whole_cifar_network(device):
    cfg = dict(type='ResNet_CIFAR', depth=18, stem_channels=8, base_channels=8)
    backbone = dict(type='MoEBackbone', num_experts=2, include=[r'layer\d\.\d+\.conv\d'], backbone=cfg)
    head = dict(type='LinearClsHead', num_classes=10, in_channels=64)
    model = MODELS.build(
        dict(type='ImageClassifier', backbone=backbone, neck=dict(type='GlobalAveragePooling'), head=head)
    )
    victim = Victim(model.to(device)).eval()
    points = torch.rand(4, 3, 32, 32, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(victim(points).sum(), points)
    assert grad.isfinite().all() and grad.abs().sum() > 0
