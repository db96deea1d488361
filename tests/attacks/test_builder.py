import inspect
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchattacks
from mmengine.registry import DefaultScope
from torch import nn
from torchattacks.attack import Attack

from mmadvmoe.attacks import NonFiniteImagesError, Victim, build_attack
from mmadvmoe.attacks.settings import SOFT_LABEL_ATTACKS
from mmadvmoe.evaluation.named_attacks import build_attacks
from mmadvmoe.registry import ATTACKS

ATTACKS.get('PGD')  # fills the registry
# Those need routers; see test_router_attack.py and tests/models/test_held_routes.py.
NAMES = sorted(set(ATTACKS.module_dict) - {'RouterAttack', 'ClassGroupAttack'})
# Whatever an attack has of these, at its smallest: what is tested is not how strong it is.
QUICK = dict(
    steps=2,
    n_queries=5,
    max_iterations=10,
    binary_search_steps=2,
    nb_sample=4,
    max_batch_size=4,
    restarts=2,
    popsize=4,
    num_iter_set=2,
)


def quick(name, **kwargs):
    if name == 'MultiAttack':
        kwargs = dict(attacks=[dict(type='PGD', steps=1), dict(type='Square', n_queries=5)]) | kwargs
    parameters = inspect.signature(ATTACKS.get(name)).parameters
    return dict(type=name, **{key: value for key, value in QUICK.items() if key in parameters}, **kwargs)


def test_every_class_of_torchattacks_is_there_but_those_that_take_more_than_a_model():
    theirs = {name for name in torchattacks.__all__ if issubclass(getattr(torchattacks, name), Attack)}
    assert theirs - set(NAMES) == {'LGV'}
    assert set(NAMES) - theirs == {'TRADESAttack', 'RoutePGD'}
    assert ATTACKS.get('PGDL2') is torchattacks.PGDL2


@pytest.mark.parametrize('scope', ['mmpretrain', 'mmengine', 'mmadvmoe'])
def test_builds_under_any_default_scope(make_tiny, scope):
    victim, images, labels = make_tiny()
    with DefaultScope.overwrite_default_scope(scope):
        built = ATTACKS.build(dict(type='BIM', model=victim, steps=1))
        assert type(built) is torchattacks.BIM
        attack = build_attack(dict(type='PGD', steps=1), victim)
        assert attack(images, labels).shape == images.shape


@pytest.mark.parametrize('name', NAMES)
def test_every_attack_gives_images_of_the_ball_and_touches_nothing(make_tiny, name):
    victim, images, labels = make_tiny()
    model = victim.classifier.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    untouched = images.clone()
    attack = build_attack(quick(name), victim)
    with torch.no_grad():
        adversarial = attack(images, labels)
    assert attack.name == name
    assert adversarial.shape == images.shape and adversarial.dtype == images.dtype
    assert not adversarial.requires_grad
    assert 0 <= adversarial.min() and adversarial.max() <= 1
    if attack.eps is not None:
        norm = 2 if name in ('PGDL2', 'PGDRSL2') else float('inf')
        distance = (adversarial - images).flatten(1).norm(p=norm, dim=1)
        assert distance.max() <= attack.eps + 1e-6
    assert torch.equal(images, untouched)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize('name', NAMES)
def test_seeded_attack_is_a_function_of_its_arguments(make_tiny, name):
    victim, images, labels = make_tiny()
    attack = build_attack(quick(name), victim)
    first = attack(images, labels, seed=11)
    torch.rand(5), np.random.rand(5), random.random()
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    again = attack(images, labels, seed=11)
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]


# Steps so short that they do not wipe out the start; an eps so large that APGD and Square, which
# give the clean image back where they fail, succeed.
@pytest.mark.parametrize(
    'cfg',
    [
        dict(type='PGD', steps=1, alpha=1e-4),
        dict(type='RoutePGD', steps=1, alpha=1e-4),
        dict(type='TRADESAttack', steps=1, alpha=1e-4),
        dict(type='APGD', steps=1, eps=1.0),
        dict(type='Square', n_queries=5, eps=1.0),
    ],
)
def test_another_seed_gives_another_start(make_tiny, cfg):
    victim, images, labels = make_tiny()
    attack = build_attack(cfg, victim)
    assert not torch.equal(attack(images, labels, seed=1), attack(images, labels, seed=2))


@pytest.mark.parametrize('name', ['APGD', 'FAB', 'AutoAttack'])
def test_unseeded_attack_does_not_reset_the_ambient_random_state(make_tiny, name):
    victim, images, labels = make_tiny()
    attack = build_attack(quick(name), victim)
    after = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        attack(images, labels)
        after.append(torch.rand(4))
    assert not torch.equal(*after)


def test_seed_of_the_config_holds_where_the_call_has_none(make_tiny):
    victim, images, labels = make_tiny()
    cfg = quick('APGD', eps=1.0, seed=3)
    attack = build_attack(cfg, victim)
    assert torch.equal(attack(images, labels), attack(images, labels))
    assert attack.attack.seed == 3
    attack(images, labels, seed=8)
    assert attack.attack.seed == 3


@pytest.mark.parametrize('name', NAMES)
def test_soft_labels_work_or_are_refused_by_name(make_tiny, name):
    victim, images, labels = make_tiny()
    attack = build_attack(quick(name), victim)
    one_hot = F.one_hot(labels, 5).float()
    ignores_labels = name in ('GN', 'TPGD', 'TRADESAttack', 'VANILA')
    assert attack.soft_labels == (name in SOFT_LABEL_ATTACKS or ignores_labels)
    if attack.soft_labels:
        hard = attack(images, labels, seed=1)
        torch.testing.assert_close(attack(images, one_hot, seed=1), hard)
    else:
        with pytest.raises(ValueError, match=f"type='{name}' takes class indices"):
            attack(images, one_hot)


@pytest.mark.parametrize('name', ['PGD', 'BIM', 'MIFGSM', 'PIFGSM'])
def test_soft_labels_are_not_rounded_to_hard_ones(make_tiny, name):
    victim, images, labels = make_tiny()
    attack = build_attack(quick(name), victim)
    mixed = 0.5 * F.one_hot(labels, 5).float() + 0.5 * F.one_hot((labels + 1) % 5, 5).float()
    assert not torch.equal(attack(images, mixed, seed=1), attack(images, labels, seed=1))


class FailingHead(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError('out of memory')
        return super().forward(x)


def test_flags_are_restored_when_an_attack_fails(make_tiny):
    victim, images, labels = make_tiny()
    model = victim.classifier.train()
    model.backbone.eval()
    model.backbone.requires_grad_(False)
    model.head = FailingHead(64, 5)
    attack = build_attack(dict(type='PGD', steps=5), victim)
    with pytest.raises(RuntimeError, match='out of memory'):
        attack(images, labels)
    assert model.training and model.head.training and not model.backbone.training
    assert all(p.requires_grad for p in model.head.parameters())
    assert not any(p.requires_grad for p in model.backbone.parameters())


def test_eval_mode_inside(make_tiny):
    victim, images, labels = make_tiny()
    victim.classifier.backbone.layers.append(nn.BatchNorm1d(64))
    victim.train()
    before = victim.classifier.backbone.layers[-1].running_mean.clone()
    modes = []
    victim.classifier.head.register_forward_hook(lambda head, *_: modes.append(head.training))
    build_attack(dict(type='PGD', steps=2), victim)(images, labels)
    assert modes == [False, False]
    assert torch.equal(victim.classifier.backbone.layers[-1].running_mean, before)


def test_runs_under_inference_mode(make_tiny):
    victim, images, labels = make_tiny()
    attack = build_attack(dict(type='PGD', steps=2), victim)
    with torch.inference_mode():
        adversarial = attack(images * 1.0, labels + 0)
    assert (adversarial - images).abs().max() > 0


@pytest.mark.parametrize(('num_classes', 'targets'), [(2, 1), (3, 2), (100, 99)])
def test_class_count_is_passed_through(make_tiny, num_classes, targets):
    victim, images, labels = make_tiny(num_classes)
    fab = build_attack(quick('FAB', multi_targeted=True), victim)
    assert fab.attack.n_target_classes == targets
    jsma = build_attack(quick('JSMA'), victim)
    goal = jsma.attack.get_target_label(images, labels)
    assert torch.equal(goal, (labels + 1) % num_classes)
    if num_classes > 3:
        assert build_attack(quick('APGDT'), victim).attack.n_target_classes == targets
    else:
        with pytest.raises(ValueError, match=f'at least 4 classes .* {num_classes}'):
            build_attack(quick('APGDT'), victim)
    assert fab(images, labels).shape == images.shape


def test_class_count_of_a_foreign_module_is_that_of_its_logits(make_tiny):
    victim, images, _ = make_tiny()
    victim.classifier.head.num_classes = 1000  # means something else there
    victim = Victim(victim.classifier)
    with pytest.raises(ValueError, match="type='AutoAttack' needs n_classes, .*: classify an image first"):
        build_attack(dict(type='AutoAttack'), victim)
    assert build_attack(dict(type='AutoAttack', n_classes=5), victim)
    victim(images)
    assert victim.num_classes == build_attack(dict(type='AutoAttack'), victim).attack.n_classes == 5
    assert Victim(victim.classifier, num_classes=5).num_classes == 5
    with pytest.raises(ValueError, match='num_classes=7, but TinyClassifier gives 5 logits'):
        Victim(victim.classifier, num_classes=7)(images)


@pytest.mark.parametrize(
    ('cfg', 'message'),
    [
        (dict(type='PDG'), "type='PDG' is unknown \\(did you mean 'PGD'"),
        (dict(type='MultiAttack'), "type='MultiAttack' needs attacks"),
        (dict(type='MultiAttack', attacks=[dict(type='PGD')]), 'must be a list of at least two configs'),
        (dict(type='MultiAttack', attacks=[dict(type='PGD'), dict(type='PGDL2')]), 'have radii in L2, Linf'),
        (dict(type='MultiAttack', attacks=[dict(type='PGD', route='held')] * 2), "give route='held' to it"),
        (dict(type=torchattacks.MultiAttack, attacks=[]), "give configs: dict\\(type='MultiAttack', attacks="),
        (dict(type='LGV'), "type='LGV' trains a copy of the model on a data loader"),
        (dict(type=torchattacks.LGV, trainloader=[]), 'trains a copy of the model on a data loader'),
        (
            dict(type='PGD', targeted='least_likely'),
            "targeted='least_likely' .* mean 'least-likely'",
        ),
        (dict(type='PGD', targeted=dict(by='random', kth_min=2)), 'must be one of label, least-likely, random'),
        (dict(type='APGD', targeted='random'), "type='APGD': targeted is not for APGD, which has no targeted mode"),
        (dict(type='RoutePGD', targeted='random'), 'targeted is not for RoutePGD'),
        (dict(eps=0.1), 'has no type'),
        (dict(type='PGD', eps=-0.1), r'eps=-0\.1 must be a number of at least 0'),
        (dict(type='PGD', eps=8), r'eps=8 is above 1, but images .* write eps=8 / 255'),
        (dict(type='PGD', eps='8/255'), r"eps='8/255' must be a number"),
        (dict(type='PGD', eps=float('nan')), 'eps=nan must be a number'),
        (dict(type='PGD', alpha=2.0), r'alpha=2\.0 is above 1'),
        (dict(type='PGD', alpha=-1), 'alpha=-1 must be a number of at least 0'),
        (dict(type='PIFGSM', max_epsilon=16), 'max_epsilon=16 is above 1'),
        (dict(type='AutoAttack', norm='Linf', eps=8), 'eps=8 is above 1'),
        (dict(type='PGD', steps=0), 'steps=0 must be a whole number of at least 1'),
        (dict(type='PGD', steps=10.0), r'steps=10\.0 must be a whole number'),
        (dict(type='RoutePGD', steps=True), 'steps=True must be a whole number'),
        (dict(type='Square', n_queries=0), 'n_queries=0 must be a whole number'),
        (dict(type='PGD', step=10), "argument='step' is unknown \\(did you mean 'steps'"),
        (dict(type='PGD', model=None), "argument='model' is unknown"),
        (dict(type='APGD', norm='l2'), "norm='l2' is unknown \\(did you mean 'L2'"),
        (dict(type='Square', norm='L1'), r"no norm='L1' for it; allowed: \('Linf', 'L2'\)\. In L1 there are PGD"),
        (dict(type='FAB', norm='L1'), "type='FAB': there is no norm='L1'"),
        (dict(type='AutoAttack', attacks_to_run=['apgd-ce', 'squar']), r"attacks_to_run='squar' .*mean 'square'"),
        (dict(type='AutoAttack', attacks_to_run='square'), "attacks_to_run='square' must be a list"),
        (dict(type='AutoAttack', version='fast'), "version='fast' is unknown"),
        (dict(type='PGD', restarts=2, random_start=False), 'restarts=2 without a random start'),
        (dict(type='PGD', route='hold'), "type='PGD': route='hold' is unknown \\(did you mean 'held'"),
        (dict(type='FAB', route=0), "type='FAB': route=0 is unknown"),
        (dict(type='RoutePGD', route='held'), "type='RoutePGD' chooses routes itself"),
        (dict(type='RouterAttack'), 'the model has none'),
        (dict(type='APGDT', n_classes=6), r'n_classes=6 .* \(5\)'),
    ],
)
def test_bad_configs_are_named(make_tiny, cfg, message):
    victim, _, _ = make_tiny()
    with pytest.raises(ValueError, match=message):
        build_attack(cfg, victim)


@pytest.mark.parametrize('cfg', ['PGD', dict(type=nn.Linear)])
def test_what_is_no_attack_is_a_type_error(make_tiny, cfg):
    victim, _, _ = make_tiny()
    with pytest.raises(TypeError, match='attack'):
        build_attack(cfg, victim)


@pytest.mark.parametrize(
    'cfg',
    [
        dict(type='PGDL2', eps=2.0),
        dict(type='AutoAttack', norm='L2', eps=3.0),
        dict(type='TRADESAttack', norm='L2', eps=1.5, alpha=2.0),
        dict(type='PGD', eps=0, alpha=0),
        dict(type=torchattacks.PGD),
        dict(type='mmpretrain.PGD'),
    ],
)
def test_good_configs_pass(make_tiny, cfg):
    victim, _, _ = make_tiny()
    assert build_attack(cfg, victim).eps == cfg.get('eps', 8 / 255)


@pytest.mark.parametrize(('norm', 'diameter'), [('L2', 192**0.5), ('L1', 192.0)])
@pytest.mark.parametrize('name', ['PGD', 'RoutePGD', 'TRADESAttack'])
def test_radius_beyond_the_images_is_named(make_tiny, name, norm, diameter):
    victim, images, labels = make_tiny()
    build_attack(quick(name, norm=norm, eps=diameter * 0.999), victim)(images, labels)
    with pytest.raises(ValueError, match=f"type='{name}': eps=.* in {norm} is above .* 192 numbers"):
        build_attack(quick(name, norm=norm, eps=diameter * 1.001), victim)(images, labels)


def test_a_radius_can_be_checked_under_the_name_of_an_evaluation(make_tiny):
    victim, _, _ = make_tiny()
    for cfg in (dict(type='PGDL2', eps=13.8), dict(type='PGD', eps=1)):
        build_attack(cfg, victim).check_radius(192)
    with pytest.raises(ValueError, match=r"'a': eps=14 in L2 .* 13\.86.* eps=14 / 255"):
        build_attack(dict(type='PGDL2', eps=14), victim).check_radius(192, "'a'")
    with pytest.raises(ValueError, match="'a': eps=200 in L1"):
        build_attack(dict(type='RoutePGD', norm='L1', eps=200), victim).check_radius(192, "'a'")


def test_bad_images_and_labels_are_named(make_tiny):
    victim, images, labels = make_tiny()
    attack = build_attack(dict(type='PGD', steps=1), victim)
    cases = SimpleNamespace(
        normalised=(images * 2 - 1, labels, ValueError, 'normalisation belongs inside'),
        pixels=((images * 255).byte(), labels, TypeError, 'floating point images'),
        nan=(images * float('nan'), labels, ValueError, r'must be in \[0, 1\]'),
        high=(images, labels + 5, ValueError, r'outside \[0, num_classes=5\)'),
        negative=(images, labels - 5, ValueError, r'outside \[0, num_classes=5\)'),
        missing=(images, None, ValueError, "type='PGD' needs labels"),
        short=(images, labels[:2], TypeError, r'labels must be \(4,\)'),
    )
    for images_, labels_, error, message in vars(cases).values():
        with pytest.raises(error, match=message):
            attack(images_, labels_)


def test_images_that_are_not_finite_are_named(make_tiny):
    victim, images, labels = make_tiny()
    with torch.no_grad():
        victim.classifier.head.weight.fill_(float('inf'))
    attack = build_attack(dict(type='PGDL2', steps=2), victim)
    with pytest.raises(ValueError, match="type='PGDL2' met numbers that are not finite"):
        attack(images, labels)


class NaNGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float('nan')


class WithoutGradient(nn.Module):
    """Finite logits, whose gradient at the images is NaN."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images):
        return NaNGradient.apply(images).flatten(1)[:, :10] * self.scale


@pytest.mark.parametrize('name', ['FGSM', 'BIM', 'MIFGSM', 'NIFGSM', 'APGD', 'PGD', 'RoutePGD', 'AutoAttack'])
def test_gradients_that_are_nan_are_not_taken_for_robustness(name):
    images = torch.rand(4, 1, 8, 8)
    attack = build_attack(quick(name), Victim(WithoutGradient(), num_classes=10))
    with pytest.raises(NonFiniteImagesError, match=f"type='{name}' met numbers that are not finite"):
        attack(images, images.flatten(1)[:, :10].argmax(1))


def test_zero_eps_gives_the_clean_images(make_tiny):
    victim, images, labels = make_tiny()
    for name in ('PGD', 'RoutePGD', 'TRADESAttack', 'APGD', 'Square', 'FAB'):
        attack = build_attack(quick(name, eps=0.0), victim)
        torch.testing.assert_close(attack(images, labels), images, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ('steps', 'alpha', 'advice'), [(10, 0.05, '0.275'), (2, 0.4, '0.55'), (1, 0.4, '1.1'), (10, 0.11, None)]
)
def test_steps_that_do_not_reach_the_radius_are_warned_of(make_tiny, monkeypatch, steps, alpha, advice):
    lines = []
    monkeypatch.setattr('mmadvmoe.attacks.builder.print_log', lambda text, **_: lines.append(text))
    cfg = dict(type='RoutePGD', eps=1.1, alpha=alpha, steps=steps, norm='L2')
    build_attack(cfg, make_tiny()[0])
    assert not lines  # curves take fewer steps on purpose
    build_attacks(dict(strong=cfg), make_tiny()[0], 'test_cfg.attacks')
    assert len(lines) == (advice is not None)
    if advice:
        assert f'test_cfg.attacks.strong (RoutePGD): steps={steps} of alpha={alpha:.4g} do not reach' in lines[0]
        assert lines[0].endswith(f'take alpha={advice}')
