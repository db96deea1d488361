"""Checks of attacks, on a small network that was trained honestly and on the same one with its gradient hidden."""

import pytest
import torch
import torch.nn.functional as F
from mmpretrain.registry import DATASETS, MODELS
from small_mixtures import UNIT
from torch import nn

import mmadvmoe  # noqa: F401
from mmadvmoe.attacks import Victim, build_attack
from mmadvmoe.diagnosis.soundness import Measured, Point, ascents, curves, gradients, measure, ra_of_each
from mmadvmoe.diagnosis.soundness_checks import PASS, SKIP, WARN, make_checks
from mmadvmoe.diagnosis.subject import Images, ThreatModel
from mmadvmoe.diagnosis.substitute import predict, train_substitute

THREAT = ThreatModel('Linf', 0.12, 0.024, 20)


@MODELS.register_module(force=True)
class TinyFeatures(nn.Module):
    """(B, 3, 8, 8) -> (B, 64)."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1)
        self.conv = nn.Conv2d(16, 16, 3, 2, 1)

    def forward(self, x):
        return (self.conv(self.stem(x).relu()).relu().flatten(1),)


class Quantiser(nn.Module):
    """A preprocessor that rounds pixels to few levels: what a gradient cannot pass."""

    def normalize(self, images):
        return (images * 8).round() / 8


def classifier(backbone):
    head = dict(type='LinearClsHead', num_classes=10, in_channels=256)
    return MODELS.build(dict(type='ImageClassifier', data_preprocessor=UNIT, backbone=backbone, head=head)).eval()


@pytest.fixture(scope='module')
def digits():
    def images_of(split):
        dataset = DATASETS.build(dict(type='Digits', split=split, pipeline=[dict(type='PackInputs')]))
        samples = [dataset[i] for i in range(len(dataset))]
        images = torch.stack([sample['inputs'] for sample in samples]) / 255
        return images, torch.cat([sample['data_samples'].gt_label for sample in samples])

    return images_of('train'), images_of('test')


@pytest.fixture(scope='module')
def trained(digits):
    """A dense classifier, adversarially trained for a few seconds."""
    torch.manual_seed(0)
    model = classifier(dict(type='TinyFeatures'))
    attack = build_attack(dict(type='PGD', eps=THREAT.eps, alpha=THREAT.eps / 2, steps=3), Victim(model))
    images, labels = digits[0]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(10):
        for rows in torch.randperm(len(images)).split(64):
            adversarial = attack(images[rows], labels[rows])
            optimizer.zero_grad()
            F.cross_entropy(model(adversarial), labels[rows]).backward()
            optimizer.step()
    return model


@pytest.fixture(scope='module')
def data(digits):
    images, labels = digits[1]
    return Images(images[:60], labels[:60], chunk_size=40)


@pytest.fixture
def short_curves(monkeypatch):
    """For tests that look at no curve: most of their time would go into its points."""
    for name in ('EPS_FACTORS', 'STEP_FACTORS'):
        monkeypatch.setattr(f'mmadvmoe.diagnosis.soundness.{name}', ())


def verdicts(victim, data, threat=THREAT, **others):
    measured = measure(victim.eval(), data, threat, num_queries=300, **others)
    return measured, {check.name: check for check in make_checks(measured)}


def test_an_honest_network_passes(trained, data):
    measured, checks = verdicts(Victim(trained), data)
    assert measured.sa > 85 and 20 < measured.ra('gate') < measured.sa - 5
    assert checks.pop('routes').status == SKIP
    assert [(check.name, check.message) for check in checks.values() if check.status != PASS] == []
    assert list(ra_of_each(measured)) == ['gate', 'noise', 'transfer', 'square']
    # The substitute is a real attack: it fools more than noise does.
    assert measured.ra('transfer') < measured.ra('noise') and measured.agreement > 85
    found = curves(measured)
    assert [each['eps'] for each in found['eps']] == pytest.approx([0, 0.03, 0.06, 0.12, 0.24, 0.48, 1])
    assert [each['steps'] for each in found['steps']] == [1, 2, 10, 20, 40]
    assert found['eps'][0]['ra'] == measured.sa and found['eps'][-1]['ra'] == 0
    assert found['eps'][3]['ra'] == found['steps'][3]['ra'] == found['restarts'][0]['ra'] == measured.ra('gate')


def test_huge_logits_are_found_out(trained, data):
    model = classifier(dict(type='TinyFeatures'))
    model.load_state_dict(trained.state_dict())
    with torch.no_grad():
        model.head.fc.weight.mul_(1e4)
        model.head.fc.bias.mul_(1e4)
    measured, checks = verdicts(Victim(model), data, surrogate=Victim(trained))
    # As good as the honest one, it seems.
    assert measured.ra('gate') > 80
    assert {'zero_gradient', 'ascent', 'logit_scale', 'large_eps', 'transfer', 'square'} <= set(warned(measured))
    assert measured.zero_gradient > 0.5 and measured.rescaled < measured.unscaled - 10
    assert f'{measured.rescaled:.1f} with the logits divided' in checks['logit_scale'].message


def test_a_quantiser_is_found_out(trained, data):
    measured, checks = verdicts(Victim(trained, Quantiser()), data)
    assert measured.sa > 85 and measured.zero_gradient == 1 and measured.ascent == 0
    assert {'zero_gradient', 'ascent', 'large_eps', 'transfer', 'square'} <= set(warned(measured))
    assert 'logit_scale' not in warned(measured)
    assert measured.ra('square') < measured.ra('gate') - 5


def mixture_of_the_same(trained, scale):
    """Two experts that are the same, and a router whose logits have the given scale, with the gate of the reference."""
    backbone = dict(
        type='MoEBackbone',
        num_experts=2,
        include=['^conv$'],
        gate='logit',
        router=dict(type='ResNetRouter', base_channels=4, num_blocks=1, num_stages=1),
        backbone=dict(type='TinyFeatures'),
    )
    torch.manual_seed(0)
    model = classifier(backbone)
    dense = trained.backbone.state_dict()
    state = {name: torch.cat([value] * 2) if name.startswith('conv') else value for name, value in dense.items()}
    model.backbone.network.load_state_dict(state)
    model.head.load_state_dict(trained.head.state_dict())
    with torch.no_grad():
        model.backbone.router.fc.weight.mul_(scale)
    return Victim(model)


@pytest.mark.usefixtures('short_curves')
def test_a_gate_that_hides_the_gradient_is_found_out(trained, data):
    measured, checks = verdicts(mixture_of_the_same(trained, scale=1e4), data, surrogate=Victim(trained))
    assert checks['routes'].status == WARN and 'points above' in checks['routes'].message
    assert measured.ra('gate') > measured.ra('held') + 10
    names = ['gate', 'held', 'forced_0', 'forced_1', 'route_pgd', 'noise', 'transfer', 'square']
    assert list(ra_of_each(measured)) == names
    assert measured.ra('route_pgd') <= measured.ra('held')
    # What does not go through the gate is as it was.
    for name in ('eps_zero', 'inside', 'zero_gradient', 'ascent', 'logit_scale', 'noise', 'transfer', 'square'):
        assert checks[name].status == PASS, checks[name].message


@pytest.mark.usefixtures('short_curves')
def test_a_gate_that_hides_nothing_passes(trained, data):
    _, checks = verdicts(mixture_of_the_same(trained, scale=0.0), data, surrogate=Victim(trained))
    assert checks['routes'].status == PASS, checks['routes'].message


def measured_by_hand():
    """A sound measurement of 100 images, of which 40 are robust."""
    robust = torch.arange(100) < 40
    everything, nothing = torch.ones(100, dtype=torch.bool), torch.zeros(100, dtype=torch.bool)
    measured = Measured(sa=100, is_moe=False, margin=1.0)
    measured.robust = dict(gate=robust, noise=everything, transfer=everything, square=robust)
    measured.eps_curve = [Point(0, everything, everything), Point(0.1, robust, robust), Point(1, nothing, nothing)]
    measured.steps_curve = [Point(10, robust, robust), Point(20, robust, robust)]
    measured.restarts_curve = [Point(1, robust, robust), Point(4, robust, robust)]
    return measured


def warned(measured):
    return [check.name for check in make_checks(measured) if check.status == WARN]


def test_what_is_sound_passes():
    assert warned(measured_by_hand()) == []


@pytest.mark.parametrize(
    ('name', 'attributes'),
    [
        ('eps_zero', dict(changed_at_zero=1)),
        ('inside', dict(outside=2e-6)),
        ('zero_gradient', dict(zero_gradient=0.05)),
        ('ascent', dict(ascent=0.8)),
        ('logit_scale', dict(unscaled=43.0, rescaled=40.0)),
        ('logit_scale', dict(margin=0.0)),
    ],
)
def test_each_number_is_judged(name, attributes):
    measured = measured_by_hand()
    for key, value in attributes.items():
        setattr(measured, key, value)
    assert warned(measured) == [name]


def test_curves_may_rise_by_chance_only():
    few, many, moved = torch.arange(100) < 40, torch.arange(100) < 60, torch.arange(100) >= 58
    for name in ('steps', 'restarts'):
        for gate, judge_, expected in ((many, few, [name]), (few, many, [name]), (moved, few, []), (few, moved, [])):
            measured = measured_by_hand()
            setattr(measured, f'{name}_curve', [Point(1, few, few), Point(2, gate, judge_)])
            assert warned(measured) == expected


def test_what_other_attacks_find_is_judged():
    some = torch.arange(100) % 20 != 0  # Among them 2 of the 40 that are robust.
    more = torch.arange(100) % 10 != 0  # And here 4.
    for name in ('noise', 'transfer', 'square'):
        for robust, expected in ((some, []), (more, [name])):
            measured = measured_by_hand()
            measured.robust[name] = robust
            assert warned(measured) == expected
    measured = measured_by_hand()
    del measured.robust['square']
    assert {check.name: check.status for check in make_checks(measured)}['square'] == SKIP
    measured = measured_by_hand()
    measured.eps_curve[-1] = Point(1, some, ~some)
    assert warned(measured) == ['eps_curve', 'large_eps']
    measured = measured_by_hand()
    measured.steps_curve[-1] = Point(20, more, measured.robust['gate'] & more)
    assert warned(measured) == ['steps', 'converged']


@pytest.mark.usefixtures('short_curves')
def test_a_given_surrogate_is_used(trained, data):
    measured, checks = verdicts(Victim(trained, Quantiser()), data, surrogate=Victim(trained))
    assert not measured.substitute and 'the given surrogate' in checks['transfer'].message
    # The network without the quantiser is the best surrogate that there can be.
    assert measured.ra('transfer') < measured.ra('gate') - 10


def test_a_substitute_is_a_function_of_its_seed(trained, data, monkeypatch):
    monkeypatch.setattr('mmadvmoe.diagnosis.substitute._STEPS', 10)
    state = torch.get_rng_state()
    victim, images = Victim(trained, Quantiser()), data.images[:16]
    substitute, agreement = train_substitute(victim, images, THREAT)
    assert torch.equal(state, torch.get_rng_state())
    assert agreement == 100 * (predict(substitute, images) == predict(victim, images)).double().mean()
    again, _ = train_substitute(victim, images, THREAT)
    assert torch.equal(substitute(images), again(images))
    train_substitute(victim, images[:1], THREAT)


def test_gains_of_a_linear_model():
    """Along its gradient a linear model gains most, and how much is known."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    victim = Victim(model, num_classes=2)
    few = Images(torch.rand(6, 3, 8, 8), torch.tensor([0, 1] * 3))
    grad = gradients(victim, few)
    along, best = ascents(victim, few, THREAT, grad)
    weight = model[1].weight
    assert torch.allclose(along, 0.05 * THREAT.eps * (weight[0] - weight[1]).abs().sum().expand(6), rtol=1e-3)
    assert (along > best).all()
