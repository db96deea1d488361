import pytest
import torch

from mmadvmoe.attacks.steps import NORMS, ascend, project, random_start

ORDER = dict(Linf=float('inf'), L2=2, L1=1)


def lengths(offset, norm):
    return offset.double().flatten(1).norm(p=ORDER[norm], dim=1)


def onto_ball(offset, eps, norm):
    """Of (B, D) offsets; in L1 by bisection of the threshold."""
    if norm == 'L2':
        return offset * (eps / offset.norm(dim=1, keepdim=True)).clamp(max=1)
    low, high = torch.zeros_like(eps), offset.abs().amax(1, keepdim=True)
    for _ in range(32):
        middle = (low + high) / 2
        long = (offset.abs() - middle).clamp(min=0).sum(1, keepdim=True) > eps
        low, high = torch.where(long, middle, low), torch.where(long, high, middle)
    inside = offset.abs().sum(1, keepdim=True) <= eps
    return torch.where(inside, offset, (offset.abs() - high).clamp(min=0) * offset.sign())


@pytest.mark.parametrize('norm', ['L2', 'L1'])
def test_projection_agrees_with_alternating_projections(norm):
    """Dykstra's algorithm, which knows the ball and the box alone and converges to the nearest point of both."""
    cases = 60
    # Clean pixels at the edges of [0, 1] too, as in digits.
    images = (torch.rand(cases, 8) * torch.randint(0, 3, (cases, 8))).clamp(max=1).double()
    points = images + torch.randn(cases, 8) * torch.tensor([0.05, 0.5, 2.0]).repeat(cases // 3)[:, None]
    eps = torch.tensor([0.05, 0.3, 1.0, 3.0]).double().repeat_interleave(cases // 4)[:, None]
    nearest, ball, box = points, torch.zeros_like(points), torch.zeros_like(points)
    for _ in range(300):
        inside = images + onto_ball(nearest + ball - images, eps, norm)
        ball = nearest + ball - inside
        nearest = (inside + box).clamp(0, 1)
        box = inside + box - nearest
    for point, image, radius, expected in zip(points, images, eps, nearest):
        ours = project(point[None], image[None], radius.item(), norm)[0]
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
        # The nearest point of a convex set: no point of it, the oracle's least of all, is nearer.
        assert (ours - point).norm() <= (expected - point).norm() + 1e-6


@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('size', [1, 8, 64])
def test_projection_is_in_both_sets_and_leaves_what_is(norm, size):
    images = torch.rand(6, 3, size, size).mul(1.5).clamp(max=1)
    for eps in (0.0, 1e-3, 0.1, 2.0, 40.0):
        for scale in (1e-4, 0.1, 1.0, 100.0):
            found = project(images + scale * torch.randn_like(images), images, eps, norm)
            assert lengths(found.double() - images.double(), norm).max() <= eps + 1e-6
            assert 0 <= found.min() and found.max() <= 1
            torch.testing.assert_close(project(found, images, eps, norm), found, rtol=0, atol=1e-6)
        start = random_start(images, eps, norm)
        assert lengths(start.double() - images.double(), norm).max() <= eps * (1 + 1e-4) + 1e-6
        assert 0 <= start.min() and start.max() <= 1


@pytest.mark.parametrize('norm', ['L2', 'L1'])
def test_projection_uses_the_whole_radius(norm):
    images = torch.zeros(4, 3, 8, 8)
    found = project(images + torch.randn_like(images), images, 0.7, norm)
    torch.testing.assert_close(lengths(found - images, norm), torch.full((4,), 0.7, dtype=torch.float64))


@pytest.mark.parametrize('norm', NORMS)
def test_no_step_of_that_length_raises_a_linear_function_more(norm):
    points, grad = torch.rand(5, 3, 8, 8).double() * 0.8 + 0.1, torch.randn(5, 3, 8, 8).double()
    alpha = 0.4
    step = ascend(points, grad, alpha, norm) - points
    torch.testing.assert_close(lengths(step, norm), torch.full((5,), alpha).double())
    gain = (step * grad).flatten(1).sum(1)
    others = torch.cat([torch.randn(400, 5, 192), grad.flatten(1) + 0.1 * torch.randn(400, 5, 192)]).double()
    others = alpha * others / others.norm(p=ORDER[norm], dim=2, keepdim=True)
    if norm == 'L1':
        # Among those that move no coordinate further.
        others = others.clamp(-step.abs().amax(), step.abs().amax())
        assert ((step != 0).flatten(1).sum(1) == 10).all()
        best = grad.flatten(1).abs().topk(10).values.sum(1) * alpha / 10
    else:
        best = alpha * (grad.abs().flatten(1).sum(1) if norm == 'Linf' else lengths(grad, 'L2'))
    torch.testing.assert_close(gain, best)
    assert ((others * grad.flatten(1)).sum(2) <= gain + 1e-9).all()


def test_l1_step_passes_over_coordinates_that_cannot_move():
    points = torch.zeros(1, 3, 8, 8)
    grad = -torch.rand_like(points) - 1
    grad[0, 0, 0, :3] = 1e-3
    step = ascend(points, grad, 0.3, 'L1') - points
    expected = torch.zeros_like(points)
    expected[0, 0, 0, :3] = 0.1
    torch.testing.assert_close(step, expected)


@pytest.mark.parametrize('norm', NORMS)
def test_zero_gradient_stays(norm):
    points = torch.rand(2, 3, 8, 8)
    assert torch.equal(ascend(points, torch.zeros_like(points), 0.1, norm), points)


@pytest.mark.parametrize('scale', [1e-30, 1e30])
@pytest.mark.parametrize('norm', NORMS)
def test_a_step_does_not_depend_on_the_scale_of_the_gradient(norm, scale):
    points, grad = torch.full((2, 3, 8, 8), 0.5), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(ascend(points, scale * grad, 0.1, norm), ascend(points, grad, 0.1, norm))
