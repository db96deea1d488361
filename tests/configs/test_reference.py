"""The config of the reference code: its numbers as they were written down, and two steps by plain formulas."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from masked_mixture import MaskedMoE
from mmengine.config import Config
from mmpretrain.registry import HOOKS, MODELS
from mmpretrain.structures import DataSample
from torch import nn

from mmadvmoe.training.alternation import train_only

CONFIGS = Path(__file__).parents[2] / 'configs'
#: Facts of the public code of arXiv:2308.10110, on CIFAR-10.
REFERENCE = {
    'train_dataloader.batch_size': 128,
    'train_cfg.max_epochs': 100,
    'model.backbone.num_experts': 2,
    'model.backbone.routing': 'image',
    'model.backbone.gate': 'logit',
    'model.robust_loss.type': 'TRADESLoss',
    'model.robust_loss.beta': 6.0,
    'model.data_preprocessor.mean': None,
    'model.data_preprocessor.std': None,
    **{
        f'model.data_preprocessor.{turn}.{key}': value
        for turn in ('attack', 'router_attack')
        for key, value in dict(
            type='TRADESAttack', eps=8 / 255, alpha=5 / 255, steps=2, router_weight=1.0, gated=True
        ).items()
    },
    **{
        f'optim_wrapper.{group}.{key}': value
        for group in ('experts', 'router')
        for key, value in {
            'optimizer': dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=5e-4),
            'clip_grad': None,
        }.items()
    },
}


def small(name):
    """The config, with a network that is computed in no time."""
    cfg = Config.fromfile(CONFIGS / name)
    cfg.merge_from_dict(
        {
            'model.backbone.backbone.base_channels': 4,
            'model.backbone.backbone.stem_channels': 4,
            'model.backbone.router.base_channels': 4,
            'model.head.in_channels': 32,
        }
    )
    return cfg


def get(cfg, key):
    for part in key.split('.'):
        cfg = cfg.get(part) if cfg is not None else None
    return cfg


def test_the_numbers_are_those_of_the_reference():
    cfg = Config.fromfile(CONFIGS / 'advmoe_resnet18_cifar10_reference.py')
    assert {key: get(cfg, key) for key in REFERENCE} == REFERENCE
    assert cfg.model.router_loss == [dict(type='RouterLabelLoss', alpha=6.0, beta=6.0)]
    for group in ('experts', 'router'):
        assert cfg.param_scheduler[group].type == 'CosineAnnealingLR' and cfg.param_scheduler[group].eta_min == 0
    hook = HOOKS.build(cfg.custom_hooks[0])
    assert hook.schedule.reuse_batch and not hook.fixed_in_eval


def test_the_one_for_digits_differs_in_data_size_and_radius_alone():
    ours, theirs = (Config.fromfile(CONFIGS / f'advmoe_resnet18_{data}_reference.py') for data in ('digits', 'cifar10'))
    for key in set(REFERENCE) - {'train_dataloader.batch_size', 'train_cfg.max_epochs'}:
        if not key.endswith(('.eps', '.alpha')):
            assert get(ours, key) == get(theirs, key), key


@pytest.mark.parametrize('data', ['cifar10', 'digits'])
def test_the_stabilised_form_is_what_it_says(data):
    ours = Config.fromfile(CONFIGS / f'advmoe_resnet18_{data}_stabilised.py')
    assert ours.model.backbone.get('gate', 'softmax') == 'softmax'
    assert not ours.model.data_preprocessor.attack.get('gated', False)
    assert ours.optim_wrapper.router.optimizer.lr == 0.01 and ours.optim_wrapper.router.clip_grad.max_norm == 1.0
    assert HOOKS.build(ours.custom_hooks[0]).fixed_in_eval


class Plain(nn.Module):
    """The network in which every expert computes every image."""

    def __init__(self, model):
        super().__init__()
        self.backbone, self.fc = MaskedMoE(model.backbone), copy.deepcopy(model.head.fc)

    def forward(self, images):
        return self.fc(self.backbone(images)[-1].mean((2, 3)))


def divergence(clean, adversarial):
    return F.kl_div(F.log_softmax(adversarial, 1), F.softmax(clean, 1), reduction='sum')


def attacked(network, images, noise, eps, alpha):
    """Two steps that maximise the divergence of classes and that of routes, both through the gate."""
    network.eval()
    outputs = network, network.backbone.router
    clean = [output(images).detach() for output in outputs]
    points = images + 0.001 * noise
    for _ in range(2):
        points = points.detach().requires_grad_()
        total = sum(divergence(before, output(points)) for before, output in zip(clean, outputs))
        (grad,) = torch.autograd.grad(total, points)
        points = points.detach() + alpha * grad.sign()
        points = torch.minimum(torch.maximum(points, images - eps), images + eps).clamp(0, 1)
    return points


def plain_step(network, images, labels, noise, turn):
    """Loss and gradients of a turn; all of the network is in training mode."""
    adversarial = attacked(network, images, noise, 8 / 255, 5 / 255)
    network.train()
    if turn == 'experts':
        clean, changed = network(images), network(adversarial)
        loss = F.cross_entropy(clean, labels) + 6 * divergence(clean, changed) / len(images)
    else:
        clean, changed = network.backbone.router(images), network.backbone.router(adversarial)
        loss = 6 * F.cross_entropy(clean, labels % 2) + 6 * divergence(clean, changed) / len(images)
    network.zero_grad()
    loss.backward()
    gradients = network.backbone.named_gradients() | {'head.fc.weight': network.fc.weight.grad}
    router = {name: grad for name, grad in gradients.items() if name.startswith('router.')}
    return loss, router if turn == 'router' else {k: v for k, v in gradients.items() if k not in router}


def test_two_turns_on_a_batch_are_those_of_plain_formulas():
    cfg = small('advmoe_resnet18_cifar10_reference.py')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    nn.init.normal_(model.backbone.router.fc.weight)
    model.double().train()
    plain = Plain(model)
    hook = HOOKS.build(cfg.custom_hooks[0])
    pixels, labels = torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8), torch.arange(16) % 10
    samples = [DataSample().set_gt_label(label) for label in labels]
    for seed, turn in enumerate(('experts', 'router')):
        torch.manual_seed(seed)
        with train_only(model, turn, hook.fixed_in_eval):
            data = dict(inputs=list(pixels), data_samples=samples, turn=turn)
            batch = model.data_preprocessor(data, training=True)
            loss, _ = model.parse_losses(model(**batch, mode='loss'))
            model.zero_grad()
            loss.backward()
        torch.manual_seed(seed)
        images = pixels / 255
        expected, gradients = plain_step(plain, images.double(), labels, torch.randn_like(images).double(), turn)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        compared = 0
        for name, gradient in gradients.items():
            own = model.get_parameter(name if name.startswith('head.') else f'backbone.{name}')
            torch.testing.assert_close(own.grad, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()), msg=name)
            compared += 1
        assert compared > 10
    # Both turns normalised the router by the batch and counted, in both networks alike.
    ours, theirs = model.backbone.router.bn1, plain.backbone.router.bn1
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    assert ours.num_batches_tracked == theirs.num_batches_tracked == 4
