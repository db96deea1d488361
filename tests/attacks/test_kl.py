import pytest
import torch
from torch.distributions import Categorical
from torch.distributions import kl_divergence as reference

from mmadvmoe.attacks import kl_divergence


@pytest.mark.parametrize('shape', [(3, 5), (3, 4, 5)])
def test_equals_torch_distributions_per_image(shape):
    p, q = torch.randn(2, *shape)
    expected = reference(Categorical(logits=p), Categorical(logits=q)).view(3, -1).mean(1)
    torch.testing.assert_close(kl_divergence(p, q), expected)


def test_gradients_of_both_arguments():
    p, q = torch.randn(2, 3, 4, dtype=torch.float64).requires_grad_().unbind()
    p, q = p.detach().requires_grad_(), q.detach().requires_grad_()
    assert torch.autograd.gradcheck(kl_divergence, (p, q))


def test_full_precision_from_half():
    p, q = torch.randn(2, 3, 4, dtype=torch.bfloat16)
    result = kl_divergence(p, q)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, kl_divergence(p.float(), q.float()))


def test_far_apart_logits_stay_finite():
    p, q = torch.tensor([[1e6, 0.0]]), torch.tensor([[0.0, 1e6]])
    torch.testing.assert_close(kl_divergence(p, q), torch.tensor([1e6]))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r'\(2, 3\) and \(2, 4\)'):
        kl_divergence(torch.zeros(2, 3), torch.zeros(2, 4))
