"""What was measured, and what became of classes and routes."""

from __future__ import annotations

from dataclasses import fields

import torch

from mmadvmoe.evaluation import CLEAN, Outcome, RobustOutcomes
from mmadvmoe.report.outcome_sections import classes, facts, flow
from mmadvmoe.report.results import ModelResults


def _outcome(predictions: list[int], experts: list[list[int]]) -> Outcome:
    count = len(predictions)
    known = dict(
        logits=torch.eye(3)[predictions],
        expert=torch.tensor(experts).view(count, -1),
        attacked=torch.ones(count).bool(),
    )
    others = {field.name: torch.zeros(count, 3) for field in fields(Outcome) if field.name not in known}
    return Outcome(**known, **others)


def _model(name: str, experts: tuple[list, list], images: int = 5) -> ModelResults:
    # The third image is wrong without an attack, the first and the last are fooled.
    clean, pgd = _outcome([0, 0, 1, 1, 2], experts[0]), _outcome([1, 0, 0, 1, 1], experts[1])
    outcomes = RobustOutcomes(torch.arange(5), torch.tensor([0, 0, 0, 1, 2]), {CLEAN: clean, 'pgd': pgd})
    attacks = dict(pgd=dict(type='PGD', eps=0.2, steps=50), l2=dict(type='PGD', eps=1.0, norm='L2'))
    settings = dict(attacks=attacks, data=dict(type='Digits', num_images=images))
    model = dict(checkpoint='best.pth', class_names=['a', 'b', 'c'], num_experts=2, iteration=1900)
    return ModelResults(name, model, outcomes=outcomes, run=dict(settings=settings))


ROUTED = ([[0], [0], [1], [1], [0]], [[1], [0], [1], [0], [0]])
DENSE = ([[]] * 5, [[]] * 5)


def test_facts_stand_side_by_side() -> None:
    (table,) = facts([_model('A', ROUTED), _model('B', DENSE, images=1000)]).items
    rows = {row[0]: tuple(row[1:]) for row in table.rows}
    assert rows['threat model'] == ('Linf, eps 0.2; L2, eps 1',) * 2
    assert rows['attacks'] == ('pgd (50 steps), l2',) * 2
    assert rows['images of the evaluation'] == ('5', '1,000')
    assert rows['selected at iteration'] == ('1,900',) * 2
    assert 'images of the dissection' not in rows


def test_the_least_robust_class_comes_first() -> None:
    _, table, picture = classes([_model('A', ROUTED)]).items
    assert table.head == ('class', 'images', 'SA', 'worst case', 'routes changed')
    assert [row[0] for row in table.rows] == ['c', 'a', 'b']
    assert table.rows[1] == ('a', '3', '66.7%', '33.3%', '33.3%')
    assert 'c seen as b 1 times' in picture.alt
    assert classes([_model('B', DENSE)]).items[1].head == ('class', 'images', 'SA', 'worst case')


def test_routes_flow_from_clean_to_attacked() -> None:
    picture, by_class = flow([_model('A', ROUTED), _model('B', DENSE)]).items
    # Of images that stand the route is the clean one: only what fools the model counts.
    assert picture.alt.endswith('Images: 2 from 0 to 0, 1 from 0 to 1, 2 from 1 to 1.')
    assert by_class.alt.endswith('Most images that changed their route: a 1.')
    shares = by_class.figure.axes[0].images[0].get_array()
    assert shares.tolist() == [[1 / 3, 1 / 3, 0, 1 / 3], [0, 0, 0, 1], [1, 0, 0, 0]]
    assert [label.get_text() for label in by_class.figure.axes[0].get_xticklabels()] == ['0→0', '0→1', '1→0', '1→1']
