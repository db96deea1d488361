"""What is measured of networks that route tokens: cost, routes under attack, health in training."""

import copy
import math

import pytest
import torch
from mmpretrain.registry import MODELS

from mmadvmoe.attacks import Victim, build_attack
from mmadvmoe.cost import count_cost
from mmadvmoe.evaluation import Chunk, RobustOutcomes, route_metrics
from mmadvmoe.evaluation.chunks import evaluate_chunk
from mmadvmoe.moe import TokenRouting, router_modules
from mmadvmoe.training.health_hook import _Tally

FFN = 2 * 16 * 32  # multiply-adds of a token in a feed-forward network


def classifier(num_experts=4, top_k=1):
    torch.manual_seed(0)
    arch = dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32)
    dense = dict(type='VisionTransformer', arch=arch, img_size=8, patch_size=4)
    backbone = dict(
        type='MoEBackbone',
        num_experts=num_experts,
        include=[r'layers\.1\.ffn'],
        routing='token',
        router=dict(type='TokenRouter', top_k=top_k),
        backbone=copy.deepcopy(dense),
    )
    head = dict(type='LinearClsHead', num_classes=4, in_channels=16)
    model = MODELS.build(dict(type='ImageClassifier', backbone=dense if num_experts == 1 else backbone, head=head))
    for router in router_modules(model):
        torch.nn.init.normal_(router.weight)
    model.eval()
    return model


@pytest.mark.parametrize('top_k', [1, 2])
def test_only_active_experts_cost(top_k):
    dense, moe = count_cost(classifier(1), (3, 8, 8)), count_cost(classifier(4, top_k), (3, 8, 8))
    parameters = FFN + 32 + 16
    assert moe.params_router == 4 * 16
    assert moe.params_total == dense.params_total + 3 * parameters + 4 * 16
    assert moe.params_active == dense.params_total + (top_k - 1) * parameters + 4 * 16
    assert moe.pathway_gflops == pytest.approx(dense.pathway_gflops + (top_k - 1) * 5 * FFN / 1e9)
    assert moe.router_gflops == pytest.approx(5 * 4 * 16 / 1e9)


def test_outcomes_hold_the_experts_of_all_tokens():
    victim = Victim(classifier(top_k=2))
    images = torch.rand(6, 3, 8, 8)
    attack = build_attack(dict(type='PGD', eps=0.2, alpha=0.1, steps=3), victim)
    labels = victim(images).argmax(1)
    parts = [
        evaluate_chunk(victim, dict(pgd=attack), Chunk(i, range(6)[s], images[s], labels[s]))
        for i, s in enumerate((slice(0, 4), slice(4, 6)))
    ]
    outcomes = RobustOutcomes.merge(parts)
    clean, attacked = (outcomes.by_name[name].expert for name in ('clean', 'pgd'))
    assert clean.shape == (6, 5 * 2)
    assert torch.equal(clean, victim.forward_routed(images)[1][0].decisions)
    metrics = route_metrics(outcomes, 4)
    assert sum(metrics[f'clean/expert_share/{n}'] for n in range(4)) == pytest.approx(1)
    assert metrics['pgd/decisions_changed'] == pytest.approx((clean != attacked).double().mean().item())
    assert 0 < metrics['pgd/decisions_changed'] < metrics['pgd/route_changed'] <= 1


def test_the_health_tally_counts_tokens():
    torch.manual_seed(0)
    # Two layers of different numbers of tokens, as Swin has, and drops in the first.
    clean, attacked = (
        [TokenRouting.decide(torch.randn(3, t, 4), top_k=2, capacity_factor=c) for t, c in ((6, 0.5), (2, None))]
        for _ in range(2)
    )
    tally = _Tally(clean)
    for _ in range(2):
        tally.add(clean, attacked)
    tally.reduce()
    for index, measured in enumerate(tally.measure()):
        c, a = clean[index], attacked[index]
        shares = [measured[f'share_clean_{n}'] for n in range(4)]
        assert shares == pytest.approx([(c.expert == n).double().mean().item() for n in range(4)])
        probabilities = c.logits.softmax(-1)
        entropy = -(probabilities * probabilities.log()).sum(-1).mean().item()
        assert measured['entropy'] == pytest.approx(entropy, rel=1e-5) and entropy < math.log(4)
        assert measured['route_changed'] == pytest.approx((c.decisions != a.decisions).double().mean().item())
        dropped = (c.dropped + a.dropped) / (2 * c.expert.numel())
        assert measured['dropped'] == pytest.approx(dropped) and (dropped > 0) == (index == 0)
