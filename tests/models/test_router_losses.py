import itertools
import math

import pytest
import torch
from loss_batches import ce_by_hand, kl_by_hand, leaf, make_batch, softmax

from mmadvmoe.models import (
    Outputs,
    RobustBatch,
    RouterBalanceLoss,
    RouterGlobalEntropyLoss,
    RouterImportanceLoss,
    RouterKLLoss,
    RouterLabelLoss,
    RouterLoadLoss,
    RouterLocalEntropyLoss,
    RouterZLoss,
)
from mmadvmoe.moe import Routing, TokenRouting

torch.manual_seed(0)
N = 4


def batch_of(clean, adversarial=None, target=None):
    pair = tuple(clean), tuple(clean if adversarial is None else adversarial)
    return RobustBatch(Outputs(None, pair[0]), Outputs(None, pair[1]), target, None)


def tokens(logits, noise_std=0.0, top_k=1):
    noise = noise_std * torch.randn_like(logits) if noise_std else None
    return TokenRouting.decide(logits, top_k, noise=noise, noise_std=noise_std)


def squared_variation(values):
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values) / mean**2


def entropy(values):
    return -sum(value * math.log(value) for value in values)


def normal_tail(x):
    return 0.5 * math.erfc(x / math.sqrt(2))


@pytest.mark.parametrize('top_k', [1, 2])
def test_values_by_hand(top_k):
    logits = torch.randn(3, 5, N, dtype=torch.float64)
    routing = tokens(logits, noise_std=0.5, top_k=top_k)
    batch = batch_of([routing])
    rows = logits.flatten(0, 1)
    probabilities = rows.softmax(1)
    mean = probabilities.mean(0).tolist()
    shares = torch.bincount(routing.expert.flatten(), minlength=N) / routing.expert.numel()
    thresholds = routing.threshold.flatten().tolist()
    load = [
        sum(normal_tail((t - row[n]) / 0.5) for t, row in zip(thresholds, rows.tolist())) / len(thresholds)
        for n in range(N)
    ]
    expected = {
        'balance': N * sum(f * p for f, p in zip(shares.tolist(), mean)),
        'importance': squared_variation(mean),
        'load': squared_variation(load),
        'local_entropy': sum(entropy(row) for row in probabilities.tolist()) / len(probabilities),
        'global_entropy': -entropy(mean),
        'z': (rows.exp().sum(1).log() ** 2).mean().item(),
    }
    kinds = (RouterBalanceLoss, RouterImportanceLoss, RouterLoadLoss, RouterLocalEntropyLoss, RouterGlobalEntropyLoss)
    for kind in (*kinds, RouterZLoss):
        objective = kind(weight=2.0)
        assert objective(batch)[f'loss_{kind.term}'].item() == pytest.approx(2 * expected[kind.term], rel=1e-4), kind


def test_the_share_of_choices_that_would_be_made_again_is_the_load():
    # Without the loss, by drawing: how often is each expert chosen under fresh noise?
    logits = torch.randn(1, 40, N)
    routing = tokens(logits, noise_std=1.0)
    (loss,) = RouterLoadLoss()(batch_of([routing])).values()
    drawn = logits + torch.randn(4000, 40, N)
    # As in the paper, each expert's noise alone is drawn again, against the threshold that was met.
    load = (drawn > routing.threshold.unsqueeze(-1)).double().mean(dim=(0, 1))
    assert loss.item() == pytest.approx(squared_variation(load.tolist()), rel=0.1)


@pytest.mark.parametrize(
    'objective',
    [RouterBalanceLoss(), RouterImportanceLoss(), RouterLoadLoss(), RouterGlobalEntropyLoss()],
    ids=lambda o: o.term,
)
def test_descending_undoes_a_collapse(objective):
    bias, wanted = torch.tensor([2.0, 0.0, 0.0, 0.0], requires_grad=True), 0.3 * torch.randn(1, 60, N)

    def share_of_first():
        return tokens(wanted + bias).counts[0] / 60

    assert share_of_first() == 1
    for _ in range(300):
        (grad,) = torch.autograd.grad(
            objective(batch_of([tokens(wanted + bias, noise_std=0.5)]))[f'loss_{objective.term}'], bias
        )
        bias = (bias - 0.3 * grad).detach().requires_grad_()
    assert share_of_first() < 0.5


def test_both_entropies_make_decided_routes_and_balance_alone_does_not():
    images = torch.randn(200, 8)

    def descend(*objectives):
        weight = (0.1 * torch.randn(8, N)).requires_grad_()
        for _ in range(200):
            batch = batch_of([Routing.decide(images @ weight, gate=None)])
            loss = sum(sum(objective(batch).values()) for objective in objectives)
            (grad,) = torch.autograd.grad(loss, weight)
            weight = (weight - grad).detach().requires_grad_()
        probabilities = (images @ weight).softmax(1)
        return probabilities.amax(1).mean(), probabilities.mean(0)

    decided, shares = descend(RouterLocalEntropyLoss(), RouterGlobalEntropyLoss(2.0))
    assert decided > 0.9 and shares.amin() > 0.1
    decided, _ = descend(RouterBalanceLoss())
    assert decided < 0.5


def test_the_entropy_of_a_saturated_router_has_a_finite_gradient():
    logits = torch.tensor([[200.0, 0.0, 0.0, 0.0]], requires_grad=True)
    for kind in (RouterLocalEntropyLoss, RouterGlobalEntropyLoss):
        (loss,) = kind()(batch_of([Routing.decide(logits, gate=None)])).values()
        (grad,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite() and grad.isfinite().all()


def test_z_loss_shrinks_logits():
    logits = torch.full((1, 2, N), 9.0, requires_grad=True)
    (loss,) = RouterZLoss()(batch_of([tokens(logits)])).values()
    (grad,) = torch.autograd.grad(loss, logits)
    assert (grad > 0).all()


def test_each_router_is_measured_and_views_and_routers_are_averaged():
    routings = [[tokens(torch.randn(2, 5, N)) for _ in range(3)] for _ in range(2)]
    terms = RouterImportanceLoss(weight=3.0)(batch_of(*routings))
    assert list(terms) == ['loss_importance', 'importance_0', 'importance_1', 'importance_2']
    single = [RouterImportanceLoss()(batch_of([c], [a]))['loss_importance'] for c, a in zip(*routings)]
    for index, value in enumerate(single):
        torch.testing.assert_close(terms[f'importance_{index}'], value)
    torch.testing.assert_close(terms['loss_importance'], 3 * sum(single) / 3)


def test_image_level_routers_are_served_but_have_no_load():
    batch = batch_of([Routing.decide(torch.randn(6, N), gate=None)])
    for kind in (RouterBalanceLoss, RouterImportanceLoss, RouterZLoss):
        assert list(kind()(batch)) == [f'loss_{kind.term}']
    for routing in (batch.clean.routings[0], tokens(torch.randn(2, 3, N))):
        with pytest.raises(ValueError, match="router with noise.*routing='token'"):
            RouterLoadLoss()(batch_of([routing]))


def test_the_label_loss_of_a_token_router_is_that_of_its_tokens():
    logits, target = torch.randn(3, 5, N), torch.tensor([1, 6, 3])
    loss = RouterLabelLoss(alpha=2.0)(batch_of([tokens(logits)], target=target))['loss_route_label']
    by_token = [-logits[b, t].log_softmax(0)[target[b] % N].item() for b in range(3) for t in range(5)]
    assert loss.item() == pytest.approx(2 * sum(by_token) / 15, rel=1e-5)


@pytest.mark.parametrize('routers', [1, 3])
def test_router_label_loss_is_that_of_the_formula_averaged_over_routers(routers):
    target = torch.tensor([0, 7, 3, 5, 2])
    clean, adversarial = ([leaf(5, 4) for _ in range(routers)] for _ in range(2))
    objective = RouterLabelLoss(alpha=2.0, beta=5.0)
    losses = objective(make_batch(clean_routers=clean, adversarial_routers=adversarial, target=target))
    expert = torch.tensor([0, 3, 3, 1, 2])  # y mod 4
    label = sum(ce_by_hand(item, expert) for item in clean) / routers
    robust = sum(kl_by_hand(a, b) for a, b in zip(clean, adversarial)) / routers
    # Cross entropy is computed in float32.
    assert losses['loss_route_label'].item() == pytest.approx(2 * label, rel=1e-5)
    assert losses['loss_route_robust'].item() == pytest.approx(5 * robust, rel=1e-5)
    sum(losses.values()).backward()
    assert all(item.grad.abs().sum() > 0 for item in (*clean, *adversarial))


def test_router_label_loss_refuses_soft_labels():
    logits = leaf(2, 2)
    batch = make_batch(clean_routers=[logits], adversarial_routers=[logits], target=torch.rand(2, 4))
    with pytest.raises(ValueError, match=r'class indices.*\(2, 4\).*TRADESLoss'):
        RouterLabelLoss()(batch)


def test_router_kl_is_the_second_term_of_the_label_loss_summed_over_routers():
    clean, adversarial = [leaf(5, 3), leaf(5, 3)], [leaf(5, 3), leaf(5, 3)]
    batch = make_batch(clean_routers=clean, adversarial_routers=adversarial, target=torch.zeros(5, dtype=torch.long))
    losses = RouterKLLoss(weight=0.5)(batch)
    expected = RouterLabelLoss(alpha=1.0, beta=0.5)(batch)['loss_route_robust']
    assert list(losses) == ['loss_route_robust']
    torch.testing.assert_close(losses['loss_route_robust'], 2 * expected)
    assert losses['loss_route_robust'] > 0


def balance(*logits, weight=1.0):
    """Of one router that gives the same for clean and adversarial images."""
    rows = torch.stack(logits) if isinstance(logits[0], torch.Tensor) else torch.tensor(logits)
    return RouterBalanceLoss(weight)(make_batch(clean_routers=[rows], adversarial_routers=[rows]))['loss_balance']


def test_balance_is_its_weight_when_uniform_and_n_times_that_when_collapsed():
    even = [row for expert in range(3) for row in [[9.0 * (n == expert) for n in range(3)]]]
    assert balance(*even, weight=2.0).item() == pytest.approx(2.0)
    assert balance(*[[30.0, 0.0, 0.0]] * 3, weight=2.0).item() == pytest.approx(6.0)
    # Between the two, the more one expert takes, the larger.
    losses = [balance(*[[5.0, 0.0]] * count, *[[0.0, 5.0]] * (8 - count)).item() for count in range(4, 9)]
    assert all(a < b for a, b in itertools.pairwise(losses))


def test_balance_value_by_hand_over_routers_and_views():
    clean, adversarial = [leaf(4, 2), leaf(4, 2)], [leaf(4, 2), leaf(4, 2)]
    terms = []
    for logits in (*clean, *adversarial):
        probabilities = [softmax(row) for row in logits.tolist()]
        share = [sum(row[n] == max(row) for row in probabilities) / 4 for n in range(2)]
        mean = [sum(row[n] for row in probabilities) / 4 for n in range(2)]
        terms.append(2 * sum(f * p for f, p in zip(share, mean)))
    loss = RouterBalanceLoss()(make_batch(clean_routers=clean, adversarial_routers=adversarial))['loss_balance']
    assert loss.item() == pytest.approx(sum(terms) / 4, rel=1e-5)


def test_descending_the_balance_loss_undoes_a_collapse():
    # A bias that the images share sends all of them to expert 0; what tells them apart is small.
    bias, images = torch.tensor([2.0, 0.0, 0.0], requires_grad=True), 0.3 * torch.randn(30, 3)
    before = (bias + images).argmax(1).bincount(minlength=3)
    assert before[0] == 30
    for _ in range(200):
        (grad,) = torch.autograd.grad(balance(*(bias + images)), bias)
        assert grad.sum().abs() < 1e-6
        bias = (bias - 0.3 * grad).detach().requires_grad_()
    after = (bias + images).argmax(1).bincount(minlength=3)
    assert after.min() >= 5, after


def test_half_precision_logits_give_full_precision_losses():
    clean, adversarial = ([torch.randn(4, 2).half()] for _ in range(2))
    target = torch.tensor([0, 1, 2, 3])
    batch = make_batch(clean_routers=clean, adversarial_routers=adversarial, target=target)
    for objective in (RouterLabelLoss(), RouterKLLoss(), RouterBalanceLoss()):
        assert all(value.dtype == torch.float32 for value in objective(batch).values())


def test_a_negative_weight_is_named():
    with pytest.raises(ValueError, match=r'RouterZLoss.weight=-1'):
        RouterZLoss(weight=-1)
