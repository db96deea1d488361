from dataclasses import replace

import pytest
import torch
from mmengine.evaluator import BaseMetric, Evaluator
from mmpretrain.evaluation import Accuracy

from mmadvmoe.evaluation import Outcome, RobustOutcomes, compute_metrics, gather_outcomes, route_metrics


def _outcomes(num_images: int = 40, attacks: tuple = ('a', 'b'), seed: int = 0) -> RobustOutcomes:
    """Random outcomes of 3 classes, 2 routers and 2 experts."""
    generator = torch.Generator().manual_seed(seed)

    def outcome() -> Outcome:
        return Outcome(
            logits=torch.randn(num_images, 3, generator=generator),
            expert=torch.randint(2, (num_images, 2), generator=generator),
            distance=torch.rand(num_images, 3, generator=generator),
            attacked=torch.ones(num_images, dtype=torch.bool),
        )

    label = torch.randint(3, (num_images,), generator=generator)
    by_name = {name: outcome() for name in ('clean', *attacks)}
    return RobustOutcomes(torch.arange(num_images), label, by_name)


def _part(outcomes: RobustOutcomes, rows: list[int]) -> RobustOutcomes:
    by_name = {name: outcome.take(torch.tensor(rows)) for name, outcome in outcomes.by_name.items()}
    return RobustOutcomes(outcomes.index[rows], outcomes.label[rows], by_name)


def test_worst_takes_the_first_attack_that_fools_each_image() -> None:
    outcomes = _outcomes()
    worst = outcomes.worst()
    sources = set()
    for i, label in enumerate(outcomes.label):
        source = 'clean'
        if outcomes.by_name['clean'].prediction[i] == label:
            fooling = [n for n in ('a', 'b') if outcomes.by_name[n].prediction[i] != label]
            source = fooling[0] if fooling else 'clean'
        sources.add(source)
        expected = outcomes.by_name[source]
        assert torch.equal(worst.logits[i], expected.logits[i])
        assert torch.equal(worst.expert[i], expected.expert[i])
        assert torch.equal(worst.distance[i], expected.distance[i])
    assert sources == {'clean', 'a', 'b'}


def test_worst_accuracy_counts_images_that_survive_everything() -> None:
    outcomes = _outcomes(200)
    survives = torch.ones(200, dtype=torch.bool)
    for outcome in outcomes.by_name.values():
        survives &= outcome.prediction == outcomes.label
    metrics = compute_metrics(Evaluator(Accuracy()), outcomes)
    assert 0 < survives.sum() < 200
    assert metrics['worst/accuracy/top1'] == pytest.approx(100 * survives.double().mean().item())
    for name, outcome in outcomes.by_name.items():
        correct = (outcome.prediction == outcomes.label).double().mean().item()
        assert metrics[f'{name}/accuracy/top1'] == pytest.approx(100 * correct)


def test_parts_in_any_order_merge_to_the_whole() -> None:
    outcomes = _outcomes(7)
    merged = gather_outcomes([_part(outcomes, [4, 5, 6]), _part(outcomes, [0, 1, 2, 3])], 7)
    assert torch.equal(merged.label, outcomes.label)
    for name in ('clean', 'a', 'b'):
        assert torch.equal(merged.by_name[name].logits, outcomes.by_name[name].logits)
        assert torch.equal(merged.by_name[name].expert, outcomes.by_name[name].expert)


@pytest.mark.parametrize('rows', [[0, 1, 2, 3], [0, 1, 2, 3, 4, 4]])
def test_lost_or_repeated_images_are_noticed(rows: list[int]) -> None:
    with pytest.raises(RuntimeError, match='each of the 5 images of the data set exactly once'):
        gather_outcomes([_part(_outcomes(5), rows)], 5)
    with pytest.raises(RuntimeError, match='data set is empty'):
        gather_outcomes([], 0)


class _Places(BaseMetric):
    """Which images a metric gets to see, and in which order."""

    def process(self, data_batch: None, data_samples: list[dict]) -> None:
        self.results += [sample['sample_idx'] for sample in data_samples]

    def compute_metrics(self, results: list[int]) -> dict:
        return {'places': results}


@pytest.mark.parametrize('world_size', [1, 2, 3, 8])
def test_metrics_get_every_image_once_and_in_order(monkeypatch: pytest.MonkeyPatch, world_size: int) -> None:
    """Collected as MMEngine does: one result of each process in turn, cut to the size."""
    shares = []
    for rank in range(world_size):
        monkeypatch.setattr('mmadvmoe.evaluation.outcomes.get_dist_info', lambda rank=rank: (rank, world_size))
        places = _Places()
        evaluator = Evaluator(places)
        evaluator.evaluate = lambda size, places=places: {'p': places.results.copy()}
        compute_metrics(evaluator, _outcomes(7, attacks=()))
        # One pass without an attack, one for the worst case.
        shares.append(places.results[: len(places.results) // 2])
    assert len({len(share) for share in shares}) == 1
    assert [i for turn in zip(*shares) for i in turn][:7] == list(range(7))


def test_routes_are_counted_over_routers_and_images() -> None:
    outcomes = _outcomes(50)
    metrics = route_metrics(outcomes, 2)
    clean, attacked = outcomes.by_name['clean'].expert, outcomes.by_name['a'].expert
    assert metrics['a/expert_share/1'] == pytest.approx(attacked.double().mean().item())
    assert metrics['clean/expert_share/0'] + metrics['clean/expert_share/1'] == pytest.approx(1)
    changed = sum(bool((before != after).any()) for before, after in zip(clean, attacked)) / 50
    assert metrics['a/route_changed'] == pytest.approx(changed)
    assert 'clean/route_changed' not in metrics


def test_a_dense_model_has_no_route_metrics() -> None:
    routes, attacked = torch.empty(3, 0, dtype=torch.int64), torch.zeros(3, dtype=torch.bool)
    outcome = Outcome(torch.eye(3), routes, torch.zeros(3, 3), attacked)
    dense = RobustOutcomes(torch.arange(3), torch.arange(3), {'clean': outcome})
    assert route_metrics(dense, 1) == {}


def test_routes_are_those_of_the_images_that_an_attack_was_run_on() -> None:
    outcomes = _outcomes(50)
    b = outcomes.by_name['b']
    outcomes.by_name['b'] = replace(b, attacked=torch.arange(50) < 10)
    outcomes.by_name['a'] = replace(outcomes.by_name['a'], attacked=torch.zeros(50, dtype=torch.bool))
    metrics = route_metrics(outcomes, 2)
    changed = (b.expert[:10] != outcomes.by_name['clean'].expert[:10]).any(1).double().mean().item()
    assert metrics['b/route_changed'] == pytest.approx(changed)
    assert metrics['b/expert_share/1'] == pytest.approx(b.expert[:10].double().mean().item())
    assert not any(key.startswith('a/') for key in metrics)
