"""Mixtures as plain networks: the same logits, in a graph that holds for every batch."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from mmpretrain.registry import MODELS
from small_mixtures import UNIT, random_mixture
from torch import nn

from mmadvmoe.attacks import NormalizedClassifier
from mmadvmoe.moe import deployable, router_modules
from mmadvmoe.moe.backbone import MoEBackbone


@pytest.fixture(params=['image', 'layer', 'token'])
def mixture(request: pytest.FixtureRequest) -> NormalizedClassifier:
    torch.manual_seed(0)
    return random_mixture(request.param).model


def _images(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(count))


@torch.no_grad()
def test_all_experts_computed_and_selected_is_the_mixture(mixture: NormalizedClassifier) -> None:
    before = copy.deepcopy(mixture.state_dict())
    plain = deployable(mixture)
    assert not any(isinstance(module, MoEBackbone) for module in plain.modules())
    for count in (1, 7, 64):
        expected, routings = mixture.forward_routed(_images(count))
        torch.testing.assert_close(plain(_images(count)), expected, atol=1e-5, rtol=1e-5)
    assert all(sum(load > 0 for load in routing.counts) > 1 for routing in routings)
    # Nothing is there twice, and nothing of the copy is the model's.
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in mixture.parameters())
    assert not {id(p) for p in plain.parameters()} & {id(p) for p in mixture.parameters()}
    plain.train()
    assert not any(module.training for module in mixture.modules())
    assert all(torch.equal(value, before[key]) for key, value in mixture.state_dict().items())


@torch.no_grad()
def test_a_compiler_finds_one_graph(mixture: NormalizedClassifier) -> None:
    plain = deployable(mixture)
    compiled = torch.compile(plain.classifier, fullgraph=True, backend='eager')
    torch.testing.assert_close(compiled(mixture.normalize(_images(7))), mixture(_images(7)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_pathway_is_one_graph_and_what_the_mixture_computes_with_its_route() -> None:
    torch.manual_seed(0)
    mixture, images = random_mixture('image').model, _images(5)
    classifier = deployable(mixture).classifier
    for expert, pathway in enumerate(classifier.backbone.pathways):
        compiled = torch.compile(pathway, fullgraph=True, backend='eager')
        features = classifier.neck(compiled(mixture.normalize(images)))
        expected, _ = mixture.forward_routed(images, torch.full((5,), expert))
        torch.testing.assert_close(classifier.head(features), expected, atol=1e-5, rtol=1e-5)


def test_an_attack_with_the_route_held_can_be_compiled() -> None:
    torch.manual_seed(0)
    victim = random_mixture('image')

    def gradient(images: torch.Tensor) -> torch.Tensor:
        images = images.clone().requires_grad_()
        routings = victim.forward_routed(images)[1]
        logits, _ = victim.forward_routed(images, routings, with_logits=False, gated=False)
        return torch.autograd.grad(logits.sum(), images)[0]

    compiled = torch.compile(gradient, backend='eager')
    torch.testing.assert_close(compiled(_images(4)), gradient(_images(4)))


@torch.no_grad()
@pytest.mark.parametrize(('top_k', 'softmax'), [(1, 'before'), (2, 'after'), (2, 'before')])
def test_gates_of_tokens_are_kept(top_k: int, softmax: str) -> None:
    torch.manual_seed(0)
    mixture = random_mixture('token').model
    for router in router_modules(mixture):
        router.top_k, router.softmax = top_k, softmax
    torch.testing.assert_close(deployable(mixture)(_images(7)), mixture(_images(7)), atol=1e-5, rtol=1e-5)
    router_modules(mixture)[0].eval_capacity_factor = 1.0
    with pytest.raises(ValueError, match=r'router\.eval_capacity_factor=1\.0 drops tokens at test'):
        deployable(mixture)


@torch.no_grad()
def test_layers_of_every_form_and_dense_models() -> None:
    torch.manual_seed(0)
    conv = dict(type='ResNet_CIFAR', depth=18, num_stages=1, strides=(1,), dilations=(1,), out_indices=(0,))
    backbone = dict(type='MoEBackbone', num_experts=2, include=['layer1.*conv'], backbone=dict(conv, base_channels=4))
    cfg = dict(type='ImageClassifier', data_preprocessor=UNIT, neck=dict(type='GlobalAveragePooling'))
    cfg['head'] = dict(type='LinearClsHead', num_classes=3, in_channels=4)
    for built in (backbone, dict(conv, base_channels=4)):
        model = NormalizedClassifier(MODELS.build(dict(cfg, backbone=built))).eval()
        torch.testing.assert_close(deployable(model)(_images(3)), model(_images(3)))
    bare = MODELS.build(backbone).eval()
    torch.testing.assert_close(deployable(bare)(_images(3)), bare(_images(3)))
    plain = deployable(nn.Linear(2, 2))
    assert isinstance(plain, nn.Linear) and not plain.training


@torch.no_grad()
@pytest.mark.parametrize('form', ['trace', 'export', 'onnx'])
def test_a_graph_of_the_routes_of_an_example_is_refused(
    mixture: NormalizedClassifier, form: str, tmp_path: Path
) -> None:
    make = {
        'trace': lambda model, images: torch.jit.trace(model, images, check_trace=False),
        'export': lambda model, images: torch.export.export(model, (images,)),
        'onnx': lambda model, images: torch.onnx.export(model, (images,), tmp_path / 'model.onnx', dynamo=False),
    }[form]
    images = mixture.normalize(_images(4))
    with pytest.raises(Exception, match=r'deployable\(model\).*tools/export\.py'):
        make(mixture.classifier, images)
    assert mixture(_images(4)).shape == (4, 4)


@torch.no_grad()
def test_a_trace_of_all_experts_holds_for_other_batches(mixture: NormalizedClassifier) -> None:
    traced = torch.jit.trace(deployable(mixture).requires_grad_(False), _images(4), check_trace=False)
    for count in (1, 7):
        torch.testing.assert_close(traced(_images(count)), mixture(_images(count)), atol=1e-5, rtol=1e-5)
