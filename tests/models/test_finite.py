import pytest
import torch
from mmengine.logging import MessageHub

from mmadvmoe.models.finite import NonFiniteError, check_finite
from mmadvmoe.moe import Routing

NAN, INF = float('nan'), float('inf')


def routing(*logits):
    return Routing.decide(torch.tensor([logits]), gate=None)


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
        ({'loss': torch.tensor(0.0)}, (routing(0, 1.0), routing(0, INF)), 'router logits'),
        ({'loss': torch.tensor(NAN)}, (routing(0, NAN), routing(NAN, 0)), 'loss, router logits'),
    ],
)
def test_what_is_not_finite_is_named(losses, routings, names):
    with pytest.raises(NonFiniteError, match=f': {names}. Training was stopped'):
        check_finite(losses, routings)


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
