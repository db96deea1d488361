import itertools
import math

import pytest
import torch
from torch import nn

from mmadvmoe.models import RouterBalanceLoss
from mmadvmoe.models.objectives import (
    AdversarialCrossEntropyLoss,
    Outputs,
    RobustBatch,
    RouterKLLoss,
    RouterLabelLoss,
    TRADESLoss,
)
from mmadvmoe.moe import Routing

torch.manual_seed(0)


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def make_batch(clean=None, adversarial=None, clean_routers=(), adversarial_routers=(), target=None):
    def outputs(logits, routers):
        return Outputs(logits, tuple(Routing.decide(item, gate=None) for item in routers))

    return RobustBatch(
        outputs(clean, clean_routers),
        outputs(adversarial, adversarial_routers),
        target,
        lambda logits: nn.functional.cross_entropy(logits, target),
    )


def softmax(row):
    weights = [math.exp(value) for value in row]
    return [weight / sum(weights) for weight in weights]


def kl_by_hand(p_logits, q_logits):
    """Mean over the rows of sum p log(p / q), in plain Python."""
    rows = [
        sum(p * math.log(p / q) for p, q in zip(softmax(a), softmax(b)))
        for a, b in zip(p_logits.tolist(), q_logits.tolist())
    ]
    return sum(rows) / len(rows)


def ce_by_hand(logits, target):
    rows = [-math.log(softmax(row)[label]) for row, label in zip(logits.tolist(), target.tolist())]
    return sum(rows) / len(rows)


def test_trades_has_the_value_and_both_gradients_of_its_formula():
    clean, adversarial, target = leaf(4, 3), leaf(4, 3), torch.tensor([0, 2, 1, 1])
    losses = TRADESLoss(beta=3.0)(make_batch(clean, adversarial, target=target))
    assert losses['loss_natural'].item() == pytest.approx(ce_by_hand(clean, target))
    assert losses['loss_robust'].item() == pytest.approx(3 * kl_by_hand(clean, adversarial))
    sum(losses.values()).backward()
    # d KL(p || q) / d (logits of q) = q - p; d / d (logits of p) = p (log p/q - KL); d CE / d logits = p - onehot.
    p, q = clean.detach().softmax(1), adversarial.detach().softmax(1)
    ratio = (p / q).log()
    from_kl = p * (ratio - (p * ratio).sum(1, keepdim=True))
    torch.testing.assert_close(adversarial.grad, 3 * (q - p) / 4)
    torch.testing.assert_close(clean.grad, (p - nn.functional.one_hot(target, 3) + 3 * from_kl) / 4)


def test_trades_takes_soft_labels():
    clean, adversarial, target = leaf(4, 3), leaf(4, 3), torch.rand(4, 3).double().softmax(1)
    losses = TRADESLoss()(make_batch(clean, adversarial, target=target))
    assert losses['loss_natural'].item() == pytest.approx(-(target * clean.log_softmax(1)).sum(1).mean().item())


def test_adversarial_cross_entropy_looks_at_adversarial_images_alone():
    clean, adversarial, target = leaf(4, 3), leaf(4, 3), torch.tensor([0, 2, 1, 1])
    losses = AdversarialCrossEntropyLoss()(make_batch(clean, adversarial, target=target))
    assert losses['loss_adversarial'].item() == pytest.approx(ce_by_hand(adversarial, target))
    sum(losses.values()).backward()
    assert clean.grad is None and adversarial.grad.abs().sum() > 0


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


@pytest.mark.parametrize(
    ('kind', 'key'),
    [
        (TRADESLoss, 'beta'),
        (RouterLabelLoss, 'alpha'),
        (RouterLabelLoss, 'beta'),
        (RouterKLLoss, 'weight'),
        (RouterBalanceLoss, 'weight'),
    ],
)
@pytest.mark.parametrize('value', [-1.0, float('nan'), '6'])
def test_wrong_weights_are_named(kind, key, value):
    with pytest.raises(ValueError, match=rf'{kind.__name__}\.{key}={value!r} must be a number of at least 0'):
        kind(**{key: value})
    kind(**{key: 0})
