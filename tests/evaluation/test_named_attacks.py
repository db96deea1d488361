"""Attacks by name, at the radius that was asked for."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmadvmoe.attacks import (
    PGD,
    STANDARD_ATTACKS,
    Victim,
    attack_norm,
    build_attack,
    is_standard_attack,
    standard_attack,
)
from mmadvmoe.evaluation.named_attacks import choose_attacks, with_route_attack
from mmadvmoe.moe import PLACEMENTS

KNOWN = dict(
    pgd50=dict(type='PGD', eps=0.2, alpha=0.02, steps=50),
    mine=dict(type='FGSM', eps=0.2),
    jsma=dict(type='JSMA'),
)


@pytest.mark.parametrize('name', [name.replace('<steps>', '2') for name in STANDARD_ATTACKS])
@pytest.mark.parametrize('norm', ['Linf', 'L2', 'L1'])
def test_standard_attacks_stay_in_the_ball_that_was_asked_for(name: str, norm: str) -> None:
    if name == 'fgsm' and norm != 'Linf':
        with pytest.raises(ValueError, match=f"no 'fgsm' in norm='{norm}'; allowed: Linf"):
            standard_attack(name, 0.1, norm)
        return
    cfg = standard_attack(name, 0.1, norm)
    if cfg['type'] == 'AutoAttack':
        cfg |= dict(steps=2, n_queries=2)
    images, labels = torch.rand(6, 3, 8, 8), torch.arange(6) % 5
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    change = build_attack(cfg, Victim(model, num_classes=5))(images, labels, seed=0) - images
    length = change.flatten(1).norm(dict(Linf=torch.inf, L2=2, L1=1)[norm], dim=1)
    assert (length <= 0.1 + 1e-6).all()


def test_names_are_not_taken_for_patterns() -> None:
    assert is_standard_attack('pgd7') and is_standard_attack('routepgd100') and is_standard_attack('apgd-t')
    assert not any(map(is_standard_attack, ['pgd', 'pgd0', 'pgd<steps>', 'xpgd5', 'pgd5x', 'autoattack2']))


def test_steps_are_a_quarter_of_the_radius() -> None:
    assert standard_attack('pgd50', 0.2) == dict(type='PGD', eps=0.2, alpha=0.05, steps=50, norm='Linf')
    assert standard_attack('pgd10', 4.0, 'L1') == dict(type='PGD', eps=4.0, alpha=1.0, steps=10, norm='L1')


def test_a_known_attack_goes_before_a_standard_one() -> None:
    chosen = choose_attacks(['mine', 'pgd50', 'pgd10'], KNOWN)
    assert list(chosen) == ['mine', 'pgd50', 'pgd10']
    assert chosen['pgd50'] == KNOWN['pgd50'] and chosen['mine'] == KNOWN['mine']
    # At the radius of the config.
    assert chosen['pgd10'] == standard_attack('pgd10', 0.2)


def test_a_given_radius_counts_for_all() -> None:
    chosen = choose_attacks(['pgd50', 'pgd10', 'jsma', 'default'], KNOWN | dict(default=dict(type='PGD')), eps=0.1)
    # The step goes with it where the config leaves both to their defaults, 2 and 8 of 255, or one of them.
    assert chosen['default'] == dict(type='PGD', eps=0.1, alpha=pytest.approx(0.025))
    assert choose_attacks(['c'], dict(c=dict(type='PIFGSM')), eps=0.2) == dict(c=dict(type='PIFGSM', max_epsilon=0.2))
    half = choose_attacks(['a', 'b'], dict(a=dict(type='PGD', eps=0.1), b=dict(type='PGD', alpha=0.01)), eps=0.2)
    assert [half[name]['alpha'] for name in 'ab'] == pytest.approx([4 / 255, 0.01 * 0.2 / (8 / 255)])
    assert chosen['pgd50']['eps'] == 0.1 and chosen['pgd50']['alpha'] == pytest.approx(0.01)
    assert chosen['pgd10']['eps'] == 0.1
    assert chosen['jsma'] == KNOWN['jsma']
    assert KNOWN['pgd50']['eps'] == 0.2


def test_another_norm_takes_the_standard_attack() -> None:
    assert choose_attacks(['pgd50'], KNOWN, eps=0.5, norm='L2') == {'pgd50': standard_attack('pgd50', 0.5, 'L2')}
    with pytest.raises(ValueError, match="no attack 'mine' in norm L2"):
        choose_attacks(['mine'], KNOWN, eps=0.5, norm='L2')
    with pytest.raises(ValueError, match=r"'pgd50' needs a radius in norm L2 \(eps, or --eps\): no attack"):
        choose_attacks(['pgd50'], KNOWN, norm='L2')


@pytest.mark.parametrize(
    ('names', 'error', 'message'),
    [
        ('pgd50', TypeError, "attacks='pgd50' must be a list of names"),
        (['pgd50', 'pgd50'], ValueError, 'names pgd50 more than once'),
        (['pgd500x'], ValueError, "no attack 'pgd500x'; allowed: pgd50, mine, jsma, fgsm, pgd<steps>"),
    ],
)
def test_what_is_no_name_is_refused(names: list, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        choose_attacks(names, KNOWN)


def test_two_radii_leave_none_to_choose() -> None:
    known = dict(a=dict(type='PGD', eps=0.1), b=dict(type='PGD', eps=0.2))
    with pytest.raises(ValueError, match=r'the attacks of the config have \[0\.1, 0\.2\]'):
        choose_attacks(['pgd50'], known)
    with pytest.raises(ValueError, match=r'the attacks of the config have \[0\.031.*, 0\.1\]'):
        choose_attacks(['pgd50'], dict(known, b=dict(type='PGD')))


class _Mixture(nn.Module):
    """What tells a victim that there are routes."""

    num_routers = 1
    num_classes = 10

    def __init__(self, routing: str = 'token') -> None:
        super().__init__()
        self.classifier = SimpleNamespace(backbone=SimpleNamespace(placement=PLACEMENTS[routing]()))


def test_each_norm_gets_its_attack_on_the_routes() -> None:
    attacks = dict(
        a=dict(type='PGD', eps=0.1, steps=20), b=dict(type='FGSM', eps=0.2), c=dict(type='PGDL2', eps=0.5, steps=30)
    )
    completed = with_route_attack(attacks, _Mixture())
    assert list(completed) == ['a', 'routepgd30-linf', 'routepgd30-l2', 'b', 'c']
    assert completed['routepgd30-linf'] == standard_attack('routepgd30', 0.2)
    assert completed['routepgd30-l2'] == standard_attack('routepgd30', 0.5, 'L2')
    assert list(with_route_attack(dict(a=attacks['a']), _Mixture())) == ['a', 'routepgd20']
    by_default = with_route_attack(dict(a=dict(type='PGD')), _Mixture())
    assert 'a-held' not in by_default
    assert by_default['routepgd10'] == standard_attack('routepgd10', 8 / 255)


@pytest.mark.parametrize(
    ('attacks', 'steps'),
    [
        (dict(a=dict(type='PGD', steps=2)), 2),
        (dict(a=dict(type='PGD', steps=2), b=dict(type='APGD', steps=7)), 7),
        (dict(a=dict(type='AutoAttack', n_classes=10)), 50),
        (dict(a=dict(type='FGSM'), b=dict(type='Square')), 50),
    ],
    ids=['pgd2', 'longest', 'at_most', 'without'],
)
def test_the_attack_on_the_routes_is_as_long_as_what_was_asked_for(attacks: dict, steps: int) -> None:
    assert with_route_attack(attacks, _Mixture())[f'routepgd{steps}']['steps'] == steps


def test_each_attack_on_images_with_one_route_is_made_with_the_route_held_as_well() -> None:
    attacks = dict(
        a=dict(type='PGD', eps=0.1),
        gate=dict(type='PGD', eps=0.1, route='gate'),
        routers=dict(type='RouterAttack', eps=0.1),
        mine=dict(type='RoutePGD', eps=0.1),
    )
    completed = with_route_attack(attacks, _Mixture('image'))
    assert list(completed) == ['a', 'a-held', 'gate', 'routers', 'mine']
    assert completed['a-held'] == dict(type='PGD', eps=0.1, route='held')
    assert list(with_route_attack(dict(a=attacks['a']), _Mixture('image'))) == ['a', 'routepgd10', 'a-held']


class InL2(PGD):
    """An attack of a user, whose norm the config need not name."""

    def __init__(self, model, eps: float = 0.5, norm: str = 'L2') -> None:
        super().__init__(model, eps, norm=norm)


def test_the_norm_is_that_of_the_class_and_of_the_first_part_with_a_radius() -> None:
    own = dict(type=InL2, eps=1.5)
    assert attack_norm(own) == 'L2'
    assert attack_norm(dict(own, norm='L1')) == 'L1'
    assert attack_norm(dict(type='MultiAttack', attacks=[dict(type='OnePixel'), own])) == 'L2'
    assert attack_norm(dict(type='PGDL2')) == 'L2' and attack_norm(dict(type='FGSM', eps=0.1)) == 'Linf'
