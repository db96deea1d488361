from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from small_mixtures import random_mixture, two_experts
from torch import nn

from mmadvmoe.attacks import Victim
from mmadvmoe.diagnosis.dissection import (
    Dissection,
    decision_margins,
    dissect,
    failures,
    flips_by_margin,
    summarize,
    worse_of,
)
from mmadvmoe.diagnosis.dissection_tables import dissection_tables
from mmadvmoe.diagnosis.subject import Images, ThreatModel
from mmadvmoe.evaluation.outcomes import Outcome
from mmadvmoe.moe.token_routing import TokenRouting

THREAT = ThreatModel('Linf', 0.1, 0.025, 8)
ATTACKS = ['gate', 'route_pgd', 'end_to_end', 'router', 'experts', 'experts_free']


def on_predictions(victim, images, **others):
    """The images, labelled as the model sees them."""
    with torch.no_grad():
        return Images(images, victim(images).argmax(1), **others)


def in_two_halves(count, contrast):
    """Images that are brighter in one half by ``contrast``: left in the first half of them, right in the others."""
    images = torch.full((count, 3, 8, 8), 0.5)
    sign = torch.where(torch.arange(count) < count // 2, 1.0, -1.0).view(-1, 1, 1, 1)
    images[..., :4] += sign * contrast / 2
    images[..., 4:] -= sign * contrast / 2
    return images


def test_a_router_that_fails_is_found_out():
    """Each expert knows one class only and cannot be moved; the router can."""
    victim = two_experts(weights=[[0.0, 0.0], [0.0, 0.0]], biases=[[1.0, 0.0], [0.0, 1.0]])
    data = on_predictions(victim, in_two_halves(8, contrast=0.1))
    assert data.labels.tolist() == [1] * 4 + [0] * 4
    found = summarize(dissect(victim, data, THREAT))
    assert found['sa'] == 100
    assert found['attacks']['experts']['ra'] == 100 and found['attacks']['experts']['route_changed'] == 0
    router = found['attacks']['router']
    assert router['ra'] == 0 and router['route_changed'] == 1
    assert router['table'] == dict(kept=dict(kept=0, flipped=0), changed=dict(kept=0, flipped=8))
    assert found['attacks']['end_to_end']['ra'] == 0
    assert found['failures'] == dict(standing=0, experts=0, router=8)
    assert [each['ra'] for each in found['experts']] == [50, 50]
    assert found['best_expert'] == dict(sa=100, ra=100)
    assert found['load']['clean']['per_class'] == [[1, 0], [0, 1]]
    assert found['load']['router']['per_class'] == [[0, 1], [1, 0]]
    (flips,) = found['flips_by_margin']
    assert (flips['decisions'], flips['changed']) == (8, 1) and flips['margin_mean'] == pytest.approx(1)


def test_experts_that_fail_are_found_out():
    """Both experts look at the brightness, which is near the border of the classes; no route can be changed."""
    victim = two_experts(weights=[[1.0, 0.0], [1.0, 0.0]], biases=[[0.0, 0.45], [0.0, 0.45]])
    data = on_predictions(victim, in_two_halves(8, contrast=0.6))
    found = summarize(dissect(victim, data, THREAT))
    for name in ('gate', 'route_pgd', 'end_to_end', 'experts', 'experts_free'):
        assert found['attacks'][name]['table'] == dict(kept=dict(kept=0, flipped=8), changed=dict(kept=0, flipped=0))
    assert found['attacks']['router']['route_changed'] == 0
    assert found['failures'] == dict(standing=0, experts=8, router=0)
    assert found['best_expert'] == dict(sa=100, ra=0)


@pytest.mark.parametrize(('routing', 'routers', 'decisions'), [('image', 1, 1), ('layer', 8, 8), ('token', 2, 10)])
def test_numbers_of_any_level_of_routing_agree(routing, routers, decisions):
    victim = random_mixture(routing)
    data = on_predictions(victim, torch.rand(12, 3, 8, 8), chunk_size=5)
    data.labels[0] = (data.labels[0] + 1) % 4
    dissection = dissect(victim, data, ThreatModel('Linf', 0.4, 0.1, 6))
    assert len(dissection.widths) == routers and sum(dissection.widths) == decisions
    found = summarize(dissection)
    assert found['sa'] == pytest.approx(100 * 11 / 12)
    assert list(found['attacks']) == ATTACKS
    for name, attack in found['attacks'].items():
        counts = {(r, p): attack['table'][r][p] for r in ('kept', 'changed') for p in ('kept', 'flipped')}
        assert sum(counts.values()) == 11
        assert attack['ra'] == pytest.approx(100 * (counts['kept', 'kept'] + counts['changed', 'kept']) / 12)
        assert attack['decisions_changed'] <= attack['route_changed']
        assert (attack['route_changed'] == 0) == (attack['decisions_changed'] == 0)
        if name == 'experts':
            assert attack['route_changed'] == 0
    ra = {name: attack['ra'] for name, attack in found['attacks'].items()}
    assert ra['end_to_end'] <= min(ra['gate'], ra['route_pgd'])
    # The weak model is moved by some attack, or the above says nothing.
    assert ra['end_to_end'] < found['sa'] and found['attacks']['router']['decisions_changed'] > 0
    assert sum(found['failures'].values()) == 11 and found['failures']['standing'] == round(ra['end_to_end'] * 12 / 100)
    assert len(found['experts']) == 3
    flips = found['flips_by_margin']
    assert len(flips) == min(12 * decisions // 10, 10) and sum(each['decisions'] for each in flips) == 12 * decisions
    changed = sum(each['changed'] * each['decisions'] for each in flips) / (12 * decisions)
    assert changed == pytest.approx(found['attacks']['router']['decisions_changed'])
    for below, above in zip(flips, flips[1:]):
        assert below['margin_mean'] <= below['margin_to'] < above['margin_from'] <= above['margin_mean']
    assert found['best_expert']['ra'] >= max(each['ra'] for each in found['experts'])
    for load in found['load'].values():
        assert len(load['per_layer']) == routers
        for shares in (*load['per_layer'], *(each for each in load['per_class'] if each is not None)):
            assert len(shares) == 3 and sum(shares) == pytest.approx(1)
    tables = dissection_tables(
        dict(
            found,
            config='my.py',
            num_images=12,
            threat_model=dict(norm='Linf', eps=0.4, alpha=0.1, steps=6),
            routing=routing,
            num_experts=3,
            routers=[f'layer {n}' for n in range(routers)],
            class_names='abcd',
        )
    )
    assert f'SA {found["sa"]:.1f} %' in tables and 'best expert of each image' in tables
    assert f'layer {routers - 1} ' in tables
    assert f'{flips[0]["margin_from"]:.2f} to {flips[0]["margin_to"]:.2f} ' in tables


def test_forced_experts_are_attacked_as_networks_of_their_own():
    victim = random_mixture('image')
    data = on_predictions(victim, torch.rand(10, 3, 8, 8))
    dissection = dissect(victim, data, ThreatModel('Linf', 0.0, 0.0, 1))
    for expert, (before, after) in enumerate(dissection.pathways):
        with torch.no_grad():
            logits, _ = victim.forward_routed(data.images, torch.full((10,), expert))
        assert torch.allclose(before.logits, logits, atol=1e-5) and torch.allclose(after.logits, logits, atol=1e-5)


def test_a_dense_model_has_the_whole_only():
    victim = Victim(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), num_classes=3)
    data = on_predictions(victim, torch.rand(6, 3, 8, 8))
    found = summarize(dissect(victim, data, THREAT))
    assert list(found['attacks']) == ['end_to_end']
    assert found['failures'] is None and found['best_expert'] is None and found['flips_by_margin'] is None
    assert found['experts'] == [] and found['load'] == {}
    header = dict(config='my.py', num_images=6, routing=None, routers=[])
    header['threat_model'] = dict(norm='Linf', eps=0.1, alpha=0.025, steps=8)
    tables = dissection_tables(dict(found, **header))
    assert 'This model is dense' in tables and f'{found["attacks"]["end_to_end"]["ra"]:.1f}' in tables


def outcome(predictions, experts):
    count = len(predictions)
    attacked = torch.ones(count, dtype=torch.bool)
    return Outcome(
        torch.eye(2)[torch.tensor(predictions)], torch.tensor(experts)[:, None], torch.zeros(count, 3), attacked
    )


def test_the_worse_outcome_blames_the_route_last():
    clean = outcome([0] * 6, [0] * 6)
    first = outcome([0, 1, 0, 1, 0, 1], [0, 0, 0, 1, 0, 0])
    second = outcome([0, 0, 1, 1, 0, 1], [0, 0, 0, 0, 1, 1])
    worse = worse_of(clean, first, second, torch.zeros(6, dtype=torch.long))
    assert worse.prediction.tolist() == [0, 1, 1, 1, 0, 1]
    assert worse.expert.squeeze(1).tolist() == [0, 0, 0, 0, 1, 0]


def test_the_router_is_blamed_where_the_route_had_to_change():
    outcomes = dict(
        clean=outcome([0, 0, 0, 0, 0, 1], [0] * 6),
        # Stands; falls on its route; twice on another one; on another one, where it stands otherwise; wrong before.
        end_to_end=outcome([0, 1, 1, 1, 0, 1], [1, 0, 1, 1, 0, 0]),
        experts=outcome([0, 0, 1, 0, 1, 1], [0] * 6),
    )
    dissection = Dissection(torch.zeros(6, dtype=torch.long), outcomes, (), 2, 2, (1,))
    # The experts fall in an attack of their own where the whole model stands: it stands.
    assert failures(dissection) == dict(standing=2, experts=2, router=1)


def dissected(margins, changed, widths):
    """A dissection that knows the margins of the decisions, and which of them the attack on the router changed."""
    none = torch.zeros(len(changed), 1)
    clean = Outcome(none, torch.zeros_like(changed, dtype=torch.long), none, none > 0)
    attacked = Outcome(none, changed.long(), none, none > 0)
    return Dissection(none, dict(clean=clean, router=attacked), (), 2, 2, widths, margins=margins)


def test_flips_are_counted_by_margin():
    # Of 40 images, the 10 of the narrowest margin flip, and every second one of the 10 that follow.
    rank = torch.randperm(40)
    changed = (rank < 10) | (rank < 20) & (rank % 2 == 0)
    found = flips_by_margin(dissected(rank[:, None] * 1e-12, changed[:, None], (1,)))
    assert [(each['decisions'], each['changed']) for each in found] == [(10, 1), (10, 0.5), (10, 0), (10, 0)]
    # In units of their mean.
    ends = [(each['margin_from'] * 19.5, each['margin_mean'] * 19.5, each['margin_to'] * 19.5) for each in found]
    assert ends == [pytest.approx((a, a + 4.5, a + 9)) for a in (0, 10, 20, 30)]


def test_margins_of_routers_compare_whatever_the_scale_of_their_logits():
    margins = torch.rand(50, 3)
    changed = margins < 0.3
    found = flips_by_margin(dissected(margins, changed, (1, 2)))
    assert len(found) == 10 and {each['decisions'] for each in found} == {15}
    scaled = flips_by_margin(dissected(margins * torch.tensor([1e6, 1e-6, 1e-6]), changed, (1, 2)))
    for one, other in zip(found, scaled, strict=True):
        assert other == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize(('margin', 'unit'), [(0.7, 1), (0.0, 0)])
def test_decisions_of_the_same_margin_share_a_bin(margin, unit):
    changed = torch.arange(300) < 75
    (found,) = flips_by_margin(dissected(torch.full((300, 1), margin), changed[:, None], (1,)))
    assert found == dict(margin_from=unit, margin_mean=unit, margin_to=unit, decisions=300, changed=0.25)


@pytest.mark.parametrize(('top_k', 'expected'), [(1, [1, 4]), (2, [2, 2, 3, 3]), (3, [0] * 6)])
def test_the_margin_of_a_token_is_that_of_its_choices(top_k, expected):
    # Two tokens of one image, three experts.
    routing = TokenRouting.decide(torch.tensor([[[3.0, 2.0, 0.0], [-1.0, 2.0, 6.0]]]), top_k)
    victim = SimpleNamespace(frozen=nullcontext, decide_routes=lambda images: (routing, routing))
    margins, widths = decision_margins(victim, Images(torch.rand(1, 3, 8, 8), torch.zeros(1)))
    assert margins.tolist() == [expected * 2] and widths == [2 * top_k] * 2
