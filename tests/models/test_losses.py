import math

import pytest
import torch
import torch.nn.functional as F
from loss_batches import ce_by_hand, kl_by_hand, leaf, make_batch
from mmengine.logging import MessageHub
from torch import nn

from mmadvmoe.models import (
    AdversarialCrossEntropyLoss,
    MARTLoss,
    NonFiniteError,
    Outputs,
    RobustBatch,
    RouterBalanceLoss,
    RouterKLLoss,
    RouterLabelLoss,
    TRADESLoss,
    check_finite,
)
from mmadvmoe.moe import Routing, TokenRouting

NAN, INF = float('nan'), float('inf')

torch.manual_seed(0)


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


def mart_batch(clean, adversarial, target):
    clean, adversarial = torch.tensor(clean), torch.tensor(adversarial)
    target = torch.tensor(target)
    return RobustBatch(
        clean=Outputs(clean),
        adversarial=Outputs(adversarial),
        target=target,
        classification_loss=lambda logits: F.cross_entropy(logits, target),
    )


def test_mart_by_hand():
    # Probabilities: clean (1/2, 1/4, 1/4), adversarial (1/4, 1/2, 1/4); class 0 is true.
    clean, adversarial = [math.log(2), 0.0, 0.0], [0.0, math.log(2), 0.0]
    losses = MARTLoss(weight=4.0)(mart_batch([clean], [adversarial], [0]))
    assert losses['loss_adversarial'].item() == pytest.approx(math.log(4))
    assert losses['loss_margin'].item() == pytest.approx(math.log(2))
    divergence = 0.5 * math.log(2) - 0.25 * math.log(2)
    assert losses['loss_robust'].item() == pytest.approx(4 * divergence * 0.5)


def test_mart_weighs_the_divergence_of_misclassified_images_more():
    sure, wrong = [6.0, 0.0], [0.0, 6.0]
    known = MARTLoss()(mart_batch([sure], [wrong], [0]))['loss_robust']
    mistaken = MARTLoss()(mart_batch([wrong], [sure], [0]))['loss_robust']
    assert mistaken > 100 * known > 0


def test_mart_stays_finite_where_the_network_is_certain_and_wrong():
    data = mart_batch([[200.0, 0.0]], [[0.0, 200.0]], [0])
    data.adversarial.logits.requires_grad_()
    data.clean.logits.requires_grad_()
    sum(MARTLoss()(data).values()).backward()
    assert data.adversarial.logits.grad.isfinite().all() and data.clean.logits.grad.isfinite().all()


def test_mart_refuses_soft_labels_and_bad_weights():
    with pytest.raises(ValueError, match='MARTLoss needs hard labels'):
        MARTLoss()(mart_batch([[0.0, 1.0]], [[0.0, 1.0]], [[0.5, 0.5]]))
    with pytest.raises(ValueError, match='MARTLoss.weight=-1'):
        MARTLoss(weight=-1)


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


def routing(*logits):
    return Routing.decide(torch.tensor([logits]), gate=None)


def token_routing(*logits):
    """A router for tokens is not asked whether its logits are finite before the losses are known."""
    return TokenRouting.decide(torch.tensor([[logits]]))


def test_finite_terms_and_routes_that_were_given_pass():
    check_finite({})
    given = Routing.fixed(torch.tensor([1, 0]), num_experts=2)
    losses = {'loss_natural': torch.tensor(1e30), 'loss_aux': [torch.ones(2), torch.zeros(1)]}
    check_finite(losses, (given, routing(3.0, -2.0)))


@pytest.mark.parametrize(
    'losses, routings, names',
    [
        ({'experts/loss_natural': torch.tensor(NAN)}, (), 'experts/loss_natural'),
        ({'loss_a': torch.tensor(1.0), 'loss_b': torch.tensor([1.0, -INF])}, (), 'loss_b'),
        ({'loss_aux': [torch.tensor(1.0), torch.tensor(INF)]}, (), 'loss_aux'),
        ({'loss': torch.tensor(0.0)}, (token_routing(0, 1.0), token_routing(0, INF)), 'router logits'),
        ({'loss': torch.tensor(NAN)}, (token_routing(0, NAN), token_routing(NAN, 0)), 'loss, router logits'),
    ],
)
def test_what_is_not_finite_is_named(losses, routings, names):
    with pytest.raises(NonFiniteError, match=f': {names}. Training was stopped') as caught:
        check_finite(losses, routings)
    assert ('optim_wrapper.router.optimizer.lr' in str(caught.value)) == ('router logits' in names)
    assert ('gate="softmax"' in str(caught.value)) == ('router logits' in names)


def test_the_iteration_is_named_as_the_log_counts_it():
    hub = MessageHub.get_current_instance()
    hub.update_info('iter', 11)
    try:
        with pytest.raises(FloatingPointError, match='at iteration 12: loss'):
            check_finite({'loss': torch.tensor(NAN)})
    finally:
        hub.pop_info('iter')
    with pytest.raises(FloatingPointError, match='not finite: loss'):
        check_finite({'loss': torch.tensor(NAN)})
