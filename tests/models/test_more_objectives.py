import math

import pytest
import torch
import torch.nn.functional as F

from mmadvmoe.models import MARTLoss, Outputs, RobustBatch


def batch(clean, adversarial, target):
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
    losses = MARTLoss(weight=4.0)(batch([clean], [adversarial], [0]))
    assert losses['loss_adversarial'].item() == pytest.approx(math.log(4))
    assert losses['loss_margin'].item() == pytest.approx(math.log(2))
    divergence = 0.5 * math.log(2) - 0.25 * math.log(2)
    assert losses['loss_robust'].item() == pytest.approx(4 * divergence * 0.5)


def test_mart_weighs_the_divergence_of_misclassified_images_more():
    sure, wrong = [6.0, 0.0], [0.0, 6.0]
    known = MARTLoss()(batch([sure], [wrong], [0]))['loss_robust']
    mistaken = MARTLoss()(batch([wrong], [sure], [0]))['loss_robust']
    assert mistaken > 100 * known > 0


def test_mart_stays_finite_where_the_network_is_certain_and_wrong():
    data = batch([[200.0, 0.0]], [[0.0, 200.0]], [0])
    data.adversarial.logits.requires_grad_()
    data.clean.logits.requires_grad_()
    sum(MARTLoss()(data).values()).backward()
    assert data.adversarial.logits.grad.isfinite().all() and data.clean.logits.grad.isfinite().all()


def test_mart_refuses_soft_labels_and_bad_weights():
    with pytest.raises(ValueError, match='MARTLoss needs hard labels'):
        MARTLoss()(batch([[0.0, 1.0]], [[0.0, 1.0]], [[0.5, 0.5]]))
    with pytest.raises(ValueError, match='MARTLoss.weight=-1'):
        MARTLoss(weight=-1)
