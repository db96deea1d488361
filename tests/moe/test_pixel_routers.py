import pytest
import torch
from mmpretrain.registry import MODELS

import mmadvmoe.moe  # noqa: F401


@pytest.mark.parametrize('cfg', [dict(type='MLPRouter'), dict(type='MLPRouter', hidden=0), dict(type='ConvRouter')])
@pytest.mark.parametrize('pool', [1, 2])
def test_every_position_counts(cfg, pool):
    router = MODELS.build(dict(cfg, num_experts=3, image_size=(8, 12), in_channels=2, pool=pool))
    images = torch.rand(4, 2, 8, 12, requires_grad=True)
    logits = router(images)
    assert logits.shape == (4, 3)
    # Pooled over all positions, a shifted image would score the same.
    assert not torch.allclose(router(images.roll(4, -1)), logits, atol=1e-4)
    gradient = sum(torch.autograd.grad(logits[:, n].sum(), images, retain_graph=True)[0].abs() for n in range(3))
    assert (gradient.sum((0, 1)) > 0).float().mean() > 0.9


def test_the_linear_router_is_linear():
    router = MODELS.build(dict(type='MLPRouter', num_experts=2, image_size=4, hidden=0))
    a, b = torch.rand(2, 1, 3, 4, 4)
    torch.testing.assert_close(router(a) + router(b), router(a + b) + router(torch.zeros_like(a)))


@pytest.mark.parametrize('kind', ['MLPRouter', 'ConvRouter'])
def test_sizes_that_do_not_fit_are_named(kind):
    cfg = dict(type=kind, num_experts=2, image_size=8)
    with pytest.raises(ValueError, match=r'router.pool=3 must divide router.image_size=\(8, 8\)'):
        MODELS.build(dict(cfg, pool=3))
    router = MODELS.build(dict(cfg, pool=2))
    with pytest.raises(ValueError, match=r'router.image_size=\(8, 8\) does not fit images of \(9, 8\)'):
        router(torch.rand(2, 3, 9, 8))
    with pytest.raises(ValueError, match=r'backbone\.router\.in_channels=3, but images have 1 channels; set .*=1$'):
        router(torch.rand(2, 1, 8, 8))
