"""Every class of torchattacks by a config: the images that torchattacks itself makes, bit for bit, at the same seed."""

import inspect
import random

import numpy as np
import pytest
import small_mixtures  # noqa: F401  (registers LeftOrRight)
import torch
import torchattacks
from mmpretrain.registry import MODELS
from test_builder import quick
from torch import nn
from torchattacks.attack import Attack

from mmadvmoe.attacks import Victim, build_attack
from mmadvmoe.evaluation.named_attacks import build_attacks, choose_attacks, with_route_attack
from mmadvmoe.utils import as_plain

# As many as torchattacks' JSMA expects.
CLASSES = 10
# Nothing to compare, each with the reason.
OTHERS = {
    'AutoAttack': "that of its authors, which torchattacks' differs from; see test_autoattack.py",
    'LGV': 'refused by name, as it trains',
}
NAMES = sorted(name for name in torchattacks.__all__ if issubclass(getattr(torchattacks, name), Attack))
# Those that torchattacks has targeted modes for.
TARGETED = (
    'BIM CW DIFGSM EADEN EADL1 EOTPGD FAB FFGSM FGSM JSMA Jitter MIFGSM NIFGSM OnePixel PGD PGDL2 PGDRS PGDRSL2 '
    'PIFGSMPP Pixle RFGSM SINIFGSM SPSA Square TIFGSM UPGD VMIFGSM VNIFGSM'
).split()
MULTI = ('PGD', 'Square', 'FGSM')
SAME = [name for name in NAMES if name not in OTHERS]


# Radii at which attacks that give clean images where they fail succeed.
SETTINGS = dict(
    JSMA=dict(gamma=0.02),
    CW=dict(c=10, steps=10, lr=0.1),
    EADL1=dict(initial_const=10.0, lr=0.1),
    EADEN=dict(initial_const=10.0, lr=0.1),
    Square=dict(eps=0.8, n_queries=20),
    APGD=dict(eps=0.3),
    APGDT=dict(eps=0.3),
    FAB=dict(eps=0.5),
)


@MODELS.register_module()
class TwoConvolutions(nn.Module):
    """(B, 3, 8, 8) -> 64 features, every one of which depends on where things are."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return (torch.tanh(self.conv(self.stem(x))).flatten(1),)


def build(kind):
    dense = dict(type='TwoConvolutions')
    router = dict(image='LeftOrRight', layer='LayerRouter')
    backbone = dict(
        type='MoEBackbone',
        num_experts=2,
        include=['^conv'],
        backbone=dense,
        routing=kind,
        router=dict(type=router.get(kind)),
    )
    torch.manual_seed(0)
    model = MODELS.build(
        dict(
            type='ImageClassifier',
            backbone=dense if kind == 'dense' else backbone,
            head=dict(type='LinearClsHead', num_classes=CLASSES, in_channels=64),
        )
    )
    # Both sides give it images in [0, 1].
    model.data_preprocessor = None
    images = torch.rand(3, 3, 8, 8)
    if kind != 'dense':
        layer = model.backbone.network.conv
        with torch.no_grad():
            if kind == 'layer':
                layer.router.fc.bias -= model.backbone.forward_routed(images)[1][0].logits.mean(0)
            assert len(set(model.backbone.forward_routed(images)[1][0].expert.tolist())) == 2
    model.eval().requires_grad_(False)
    # Right by what the model says for one image, so that attacks begin, and wrong for another.
    return model, images, (model(images).argmax(1) + torch.tensor([0, 0, 1])) % CLASSES


def settings(name):
    """Arguments of the class of torchattacks, each at its smallest."""
    cfg = quick(name) | SETTINGS.get(name, {})
    known = inspect.signature(getattr(torchattacks, name)).parameters
    return {key: value for key, value in cfg.items() if key in known}


def by_torchattacks(name, model, images, labels, mode=None, *args):
    """What the class of torchattacks gives on a module, without anything of this package."""

    def make(name, **kwargs):
        cls = getattr(torchattacks, name)
        known = inspect.signature(cls).parameters
        return cls(model, **kwargs, **{k: v for k, v in dict(n_classes=CLASSES, seed=3).items() if k in known})

    if name == 'MultiAttack':
        attack = torchattacks.MultiAttack([make(part, **settings(part)) for part in MULTI])
    else:
        attack = make(name, **settings(name))
    if mode:
        getattr(attack, mode)(*args, quiet=True)
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    return attack(images.clone(), labels.clone())


def by_config(name, model, images, labels, **kwargs):
    if name == 'MultiAttack':
        kwargs['attacks'] = [dict(type=part, **settings(part)) for part in MULTI]
    cfg = dict(type=name, **settings(name) | kwargs)
    return build_attack(cfg, Victim(model, num_classes=CLASSES))(images, labels, seed=3)


def next_class(images, labels):
    return (labels + 1) % CLASSES


def test_what_is_left_out_has_a_reason():
    assert set(OTHERS) < set(NAMES) and len(SAME) == len(NAMES) - 2


@pytest.mark.parametrize('name', SAME)
@pytest.mark.parametrize('kind', ['dense', 'image', 'layer'])
def test_images_are_those_of_torchattacks(kind, name):
    model, images, labels = build(kind)
    adversarial = by_config(name, model, images, labels)
    assert torch.equal(adversarial, by_torchattacks(name, model, images, labels))
    assert name == 'VANILA' or not torch.equal(adversarial, images)


MODES = [
    ('label', 'set_mode_targeted_by_label', ()),
    ('least-likely', 'set_mode_targeted_least_likely', ()),
    (dict(by='least-likely', kth_min=2), 'set_mode_targeted_least_likely', (2,)),
    ('random', 'set_mode_targeted_random', ()),
    (next_class, 'set_mode_targeted_by_function', (next_class,)),
]


@pytest.mark.parametrize('name', SAME)
def test_targets_are_those_of_torchattacks(name):
    model, images, labels = build('image')
    for targeted, mode, args in MODES:
        if name not in TARGETED:
            with pytest.raises(ValueError, match=f'targeted is not for {name}'):
                by_config(name, model, images, labels, targeted=targeted)
            continue
        given = (labels + 3) % CLASSES if targeted == 'label' else labels
        adversarial = by_config(name, model, images, given, targeted=targeted)
        assert torch.equal(adversarial, by_torchattacks(name, model, images, given, mode, *args)), mode


def test_evaluation_and_training_refuse_labels_as_targets(make_moe):
    model, _, _ = build('image')
    victim = Victim(model, num_classes=CLASSES)
    with pytest.raises(ValueError, match=r"attacks\.aimed: targeted='label' takes the labels for targets"):
        build_attacks(dict(aimed=dict(type='PGD', targeted='label')), victim, 'attacks')
    kwargs = dict(data_preprocessor=dict(type='AdvDataPreprocessor', attack=dict(type='PGD', targeted='label')))
    with pytest.raises(ValueError, match="targeted='label' takes labels for targets"):
        make_moe(classifier='RobustClassifier', **kwargs)
    aimed = dict(type='PGD', targeted=next_class)
    assert as_plain(aimed) == dict(type='PGD', targeted='next_class')


def test_an_attack_of_several_is_known_by_its_parts():
    model, _, _ = build('image')
    victim = Victim(model, num_classes=CLASSES)
    several = dict(
        type='MultiAttack', attacks=[dict(type='PGDL2', eps=1.0), dict(type='PGDL2', eps=2.0), dict(type='CW')]
    )
    assert (build_attack(several, victim).eps, build_attack(several, victim).norm) == (2.0, 'L2')
    completed = with_route_attack(dict(several=several), victim)
    assert list(completed) == ['several', 'routepgd50', 'several-held']
    assert (completed['routepgd50']['eps'], completed['routepgd50']['norm']) == (2.0, 'L2')
    chosen = choose_attacks(['several'], dict(several=several), eps=0.5)['several']
    assert [each.get('eps') for each in chosen['attacks']] == [0.5, 0.5, None]
    routed = dict(type='MultiAttack', attacks=[dict(type='RoutePGD'), dict(type='PGD')])
    assert list(with_route_attack(dict(routed=routed), victim)) == ['routed']
