"""Costly attacks on survivors only, and worst cases over some attacks, in evaluation."""

from collections.abc import Callable

import pytest
import torch
from mmengine.evaluator import Evaluator
from mmpretrain.evaluation import Accuracy
from mmpretrain.registry import MODELS
from tiny_models import dense_backbone
from torch import Tensor

import mmadvmoe  # noqa: F401
from mmadvmoe.attacks import Victim
from mmadvmoe.evaluation import Chunk, RobustOutcomes, compute_metrics, gather_outcomes
from mmadvmoe.evaluation.chunks import evaluate_chunk
from mmadvmoe.evaluation.named_attacks import build_attacks, check_groups

ATTACKS = dict(
    pgd=dict(type='PGD', eps=0.1, alpha=0.05, steps=2),
    route=dict(type='RoutePGD', eps=0.2, alpha=0.1, steps=2),
    fgsm=dict(type='FGSM', eps=0.3),
)


@pytest.fixture(scope='module')
def case() -> tuple[Victim, Tensor, Tensor]:
    """A victim, images and labels, most of which are the victim's own predictions."""
    torch.manual_seed(0)
    model = MODELS.build(
        dict(
            type='mmpretrain.RobustClassifier',
            backbone=dict(
                type='MoEBackbone',
                num_experts=2,
                include=[r'layer1.*conv\d'],
                router=dict(type='ResNetRouter', base_channels=4, num_blocks=1),
                backbone=dense_backbone(4),
            ),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(type='LinearClsHead', num_classes=10, in_channels=8),
        )
    )
    model.init_weights()
    images = torch.rand(48, 3, 8, 8)
    victim = Victim(model)
    with torch.no_grad():
        victim(images)  # norm statistics of these images spread the predictions
        model.eval()
        labels = victim(images).argmax(1)
    labels[::6] = (labels[::6] + 1) % 10
    return victim, images, labels


def _evaluate(case: tuple, attacks: dict, **kwargs) -> RobustOutcomes:
    victim, images, labels = case
    return evaluate_chunk(victim, attacks, Chunk(0, range(len(images)), images, labels), **kwargs)


def _spied(attacks: dict, sizes: dict) -> dict:
    """Attacks that note how many images they were given."""

    def spy(name: str, attack: Callable) -> Callable:
        def call(images: Tensor, labels: Tensor, seed: int) -> Tensor:
            sizes[name] = len(images)
            return attack(images, labels, seed=seed)

        return call

    return {name: spy(name, attack) for name, attack in attacks.items()}


def test_such_an_attack_gets_survivors_and_the_others_keep_their_failure(case: tuple) -> None:
    attacks = build_attacks(ATTACKS, case[0], 'test_cfg.attacks')
    sizes: dict[str, int] = {}
    outcomes = _evaluate(case, _spied(attacks, sizes), survivors_only=['fgsm'])
    right = {name: outcome.prediction == case[2] for name, outcome in outcomes.by_name.items()}
    standing = right['clean'] & right['pgd'] & right['route']
    # Some are fooled before the last attack, some by it, some never.
    assert 0 < right['fgsm'].sum() < standing.sum() < right['clean'].sum() < 48
    assert sizes == {'pgd': 48, 'route': 48, 'fgsm': standing.sum()}
    earlier = _evaluate(case, {name: attacks[name] for name in ('pgd', 'route')}).worst()
    last = outcomes.by_name['fgsm']
    assert torch.equal(last.logits[~standing], earlier.logits[~standing])
    assert torch.equal(last.distance[~standing], earlier.distance[~standing])
    assert torch.equal(last.attacked, standing)
    assert outcomes.by_name['pgd'].attacked.all() and not outcomes.by_name['clean'].attacked.any()
    alone = _evaluate(tuple(x[standing] if isinstance(x, Tensor) else x for x in case), {'fgsm': attacks['fgsm']})
    assert torch.equal(last.logits[standing], alone.by_name['fgsm'].logits)
    assert torch.equal(right['fgsm'], outcomes.worst().prediction == case[2])


def test_an_attack_is_not_run_when_nothing_survives(case: tuple) -> None:
    attacks = build_attacks(ATTACKS, case[0], 'test_cfg.attacks')
    victim, images, labels = case
    sizes: dict[str, int] = {}
    outcomes = _evaluate((victim, images, (labels + 5) % 10), _spied(attacks, sizes), survivors_only=list(ATTACKS))
    clean = outcomes.by_name['clean']
    wrong = (clean.prediction != outcomes.label).sum()
    assert wrong == 48 and sizes == {}
    assert all(torch.equal(outcome.logits, clean.logits) for outcome in outcomes.by_name.values())


def test_worst_cases_over_some_attacks_are_metrics_of_their_own(case: tuple) -> None:
    attacks = build_attacks(ATTACKS, case[0], 'test_cfg.attacks')
    outcomes = gather_outcomes([_evaluate(case, attacks)], 48)
    groups = dict(ra=['pgd', 'route'], weak=['pgd'])
    metrics = compute_metrics(Evaluator(Accuracy()), outcomes, groups)
    right = {name: outcome.prediction == case[2] for name, outcome in outcomes.by_name.items()}
    expected = (right['clean'] & right['pgd'] & right['route']).double().mean().item()
    assert metrics['ra/accuracy/top1'] == pytest.approx(100 * expected)
    assert metrics['weak/accuracy/top1'] > metrics['ra/accuracy/top1'] > metrics['worst/accuracy/top1']
    # Predictions that --out writes are those of the last pass.
    assert list(metrics)[-1] == 'worst/accuracy/top1'


@pytest.mark.parametrize(
    ('survivors', 'groups', 'error', 'message'),
    [
        (
            ['fgms'],
            {},
            ValueError,
            r"test_cfg\.survivors_only: .*'fgms' is unknown \(did you mean 'fgsm'\?\); allowed: pgd, ",
        ),
        ('fgsm', {}, TypeError, r"test_cfg\.survivors_only must be a list of names of attacks, but got 'fgsm'"),
        ([], dict(ra=['pdg']), ValueError, r"test_cfg\.worst_of\.ra: .*did you mean 'pgd'"),
        ([], dict(worst=['pgd']), ValueError, r'test_cfg\.worst_of\.worst: .* taken are clean, worst, pgd'),
        ([], dict(pgd=['fgsm']), ValueError, r'test_cfg\.worst_of\.pgd: .* needs a name of its own'),
    ],
)
def test_names_that_refer_to_no_attack_are_refused(
    survivors: list, groups: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        check_groups(list(ATTACKS), survivors, groups, 'test')


@pytest.mark.parametrize(('norm', 'factor'), [('Linf', 1), ('L2', 192**0.5), ('L1', 192)])
def test_an_attack_that_leaves_its_ball_is_refused(case: tuple, norm: str, factor: float) -> None:
    def away(images: Tensor, labels: Tensor, seed: int) -> Tensor:
        return images * 0.5 + 0.25 + 0.1 * (images < 0.5)  # up to 0.35 away

    far = ((away(case[1], case[2], 0) - case[1]).abs()).max().item()
    away.norm, away.eps = norm, factor * far
    _evaluate(case, dict(away=away))
    away.eps = 0.01
    with pytest.raises(ValueError, match=f"attack 'away' went .* away in {norm}, beyond its eps=0.01"):
        _evaluate(case, dict(away=away))
