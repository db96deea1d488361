import pytest
import torch

from mmadvmoe.attacks.steps import largest_distance
from mmadvmoe.diagnosis.subject import ThreatModel

PGD50 = dict(type='PGD', eps=0.2, alpha=0.05, steps=50)


def test_the_threat_model_is_that_of_the_first_attack_that_tells_it():
    attacks = dict(aa=dict(type='AutoAttack', eps=0.1), pgd=PGD50, l2=dict(type='PGDL2', eps=1.0, alpha=0.2, steps=5))
    assert ThreatModel.from_attacks(attacks) == ThreatModel('Linf', 0.2, 0.05, 50)
    assert ThreatModel.from_attacks(attacks, 'l2') == ThreatModel('L2', 1.0, 0.2, 5)
    named = dict(pgd=dict(PGD50, norm='L1'))
    assert ThreatModel.from_attacks(named).norm == 'L1'


@pytest.mark.parametrize(
    ('attacks', 'name', 'message'),
    [
        (dict(aa=dict(type='AutoAttack', eps=0.1)), None, r'test_cfg.attacks tells no threat model'),
        (dict(aa=dict(type='AutoAttack', eps=0.1), pgd=PGD50), 'aa', r'test_cfg.attacks.aa tells no threat model'),
        (dict(pgd=dict(PGD50, eps=0)), None, r'tells no threat model: an attack with eps, alpha and steps above 0'),
        (dict(pgd50=PGD50), 'pgd', r"test_cfg.attacks: attack='pgd' .*did you mean 'pgd50'.* pgd50"),
    ],
)
def test_errors_name_the_config_key(attacks, name, message):
    with pytest.raises(ValueError, match=message):
        ThreatModel.from_attacks(attacks, name)


def test_no_step_is_longer_than_the_range_of_pixels():
    assert ThreatModel('Linf', 0.1, 0.2, 1).scaled(1.0).alpha == 1
    assert ThreatModel('L2', 0.1, 0.2, 1).scaled(1.0).alpha == 2


def test_balls_of_any_norm():
    images, others = torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.5)
    for norm, distance, everything in (('Linf', 0.5, 1.0), ('L2', 3**0.5, 12**0.5), ('L1', 6.0, 12.0)):
        threat = ThreatModel(norm, 0.2, 0.05, 50)
        assert threat.distance(images, others).item() == pytest.approx(distance)
        assert largest_distance(12, norm) == pytest.approx(everything)
        scaled = threat.scaled(0.4)
        assert (scaled.norm, scaled.eps, scaled.steps) == (norm, 0.4, 50) and scaled.alpha == pytest.approx(0.1)
