import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmadvmoe.attacks import ForcedRoutePGD, Victim, build_attack
from mmadvmoe.moe import Routing


def slow_pgd(victim, images, labels, eps, alpha, steps, start):
    """PGD on the whole batch; which images were fooled at any point, the last included."""
    points, fooled = start, torch.zeros(len(images), dtype=torch.bool)
    for _ in range(steps):
        points = points.detach().requires_grad_()
        logits = victim(points)
        fooled |= logits.argmax(1) != labels
        F.cross_entropy(logits, labels, reduction='sum').backward()
        points = points.detach() + alpha * points.grad.sign()
        points = torch.minimum(torch.maximum(points, images - eps), images + eps).clamp(0, 1)
    return points, fooled | (victim(points).argmax(1) != labels)


@pytest.mark.parametrize('random_start', [True, False])
def test_equals_slow_pgd_on_a_dense_model(make_tiny, random_start):
    victim, images, labels = make_tiny(batch=24)
    eps, alpha, steps = 0.03, 0.008, 10
    cfg = dict(type='RoutePGD', eps=eps, alpha=alpha, steps=steps, random_start=random_start)
    adversarial = build_attack(cfg, victim)(images, labels, seed=1)
    start = images
    if random_start:
        torch.manual_seed(1)
        start = (images + torch.empty_like(images).uniform_(-eps, eps)).clamp(0, 1)
    points, fooled = slow_pgd(victim, images, labels, eps, alpha, steps, start)
    assert 0 < fooled.sum() < len(fooled)
    assert torch.equal(victim(adversarial).argmax(1) != labels, fooled)
    torch.testing.assert_close(adversarial[~fooled], points[~fooled])


class MaskedMoE(nn.Module):
    """Two linear experts on three pixels, and a router whose common logit masks the small one.

    Expert 0 tells the class by pixel 0 and cannot be fooled within eps; expert 1 always says class
    1, and is surest of it where pixel 1 is dark, by a gradient much larger than the router's. The
    route depends on pixel 1 alone, which must be bright for expert 1. ``scale`` times a common term
    of both router logits, which decides nothing, dominates any gradient through the raw gate.
    """

    num_experts, num_routers = 2, 1

    def __init__(self, scale, gate):
        super().__init__()
        self.scale, self.gate = scale, gate
        self.unused = nn.Parameter(torch.zeros(1))

    def router(self, x):
        pixels = x.flatten(1)
        common = self.scale * pixels.sum(1)
        return torch.stack([common, common + self.scale * 1e-3 * (pixels[:, 1] - 0.5)], dim=1)

    def forward_routed(self, x, route=None, with_logits=False, gated=True):
        logits = self.router(x)
        if route is None:
            routing = Routing.decide(logits, self.gate if gated else None)
        else:
            route = route[:, 0] if route.dim() == 2 else route
            routing = Routing.fixed(route, 2, logits if with_logits else None)
        first, second, third = x.flatten(1).unbind(1)
        sure = torch.stack([10 * (first - 0.5), -10 * (first - 0.5)], dim=1)
        wrong = torch.stack([0 * first, 500 + 100 * (third - second)], dim=1)
        features = torch.where(routing.expert[:, None] == 0, sure, wrong)
        if routing.gate is not None:
            features = features * routing.gate[:, None]
        return features, (routing,)

    def forward(self, x):
        return self.forward_routed(x)[0]


class MaskedClassifier(nn.Module):
    def __init__(self, scale, gate):
        super().__init__()
        self.backbone = MaskedMoE(scale, gate)
        self.head = nn.Identity()
        self.head.num_classes = 2

    def forward(self, x):
        return self.head(self.backbone(x))


@pytest.mark.parametrize('scale', [1e-6, 1.0, 1e6, 1e18])
@pytest.mark.parametrize('norm', ['Linf', 'L2'])
def test_beats_a_masked_router(scale, norm):
    victim = Victim(MaskedClassifier(scale, 'logit'))
    images = torch.full((5, 1, 1, 3), 0.5)
    images[:, 0, 0, 0] = 0.9
    images[:, 0, 0, 1] = torch.tensor([0.36, 0.38, 0.40, 0.45, 0.10])
    labels = torch.zeros(5, dtype=torch.int64)
    common = dict(eps=0.25, alpha=0.02, steps=20)
    judge = build_attack(dict(type='RoutePGD', norm=norm, **common), victim)
    robust = victim(judge(images, labels, seed=0)).argmax(1) == labels
    # All but the last, whose route is out of reach.
    assert robust.tolist() == [False] * 4 + [True]
    if norm == 'Linf' and scale >= 1:
        pgd = build_attack(dict(type='PGD', random_start=False, **common), victim)
        assert (victim(pgd(images, labels)).argmax(1) == labels).all()


@pytest.mark.parametrize(('routing', 'num_experts'), [('image', 2), ('image', 3), ('layer', 2)])
def test_stays_in_the_ball_and_is_at_least_as_strong_as_each_run(make_moe, routing, num_experts):
    victim = Victim(make_moe(routing, num_experts).eval())
    images = torch.rand(8, 3, 8, 8)
    labels = victim(images).argmax(1)
    eps = 0.02
    cfg = dict(type='RoutePGD', eps=eps, alpha=0.005, steps=4, random_start=False)
    adversarial = build_attack(cfg, victim)(images, labels)
    assert (adversarial - images).abs().max() <= eps + 1e-6
    assert 0 <= adversarial.min() and adversarial.max() <= 1
    fooled = victim(adversarial).argmax(1) != labels
    # The first of its runs by hand: the route held at the clean one.
    route = torch.stack([routing.expert for routing in victim.forward_routed(images)[1]], dim=1)

    def held(points):
        return victim.forward_routed(points, route)[0]

    points, _ = slow_pgd(held, images, labels, eps, 0.005, 4, images)
    assert (fooled | (victim(points).argmax(1) == labels)).all()


def test_work_per_image(make_moe):
    """N + 1 runs of ``steps`` passes for an image that survives; none for one that is fooled."""
    victim = Victim(make_moe(num_experts=2).eval())
    images = torch.rand(6, 3, 8, 8)
    labels = victim(images).argmax(1)
    labels[:2] = (labels[:2] + 1) % 4
    seen = []
    handle = victim.classifier.head.register_forward_pre_hook(lambda module, args: seen.append(len(args[0][-1])))
    cfg = dict(type='RoutePGD', eps=1e-6, alpha=1e-7, steps=5)
    adversarial = build_attack(cfg, victim)(images, labels)
    handle.remove()
    # The clean pass on all; then 5 steps and a check, thrice, on those that were right.
    assert seen == [6] + 3 * 6 * [4]
    torch.testing.assert_close(adversarial[:2], images[:2], rtol=0, atol=0)


def test_one_image_and_none_to_attack(make_moe):
    victim = Victim(make_moe().eval())
    images = torch.rand(1, 3, 8, 8)
    labels = victim(images).argmax(1)
    attack = build_attack(dict(type='RoutePGD', eps=0.3, alpha=0.1, steps=3), victim)
    assert attack(images, labels).shape == images.shape
    torch.testing.assert_close(attack(images, (labels + 1) % 4), images, rtol=0, atol=0)


def test_needs_a_victim():
    from mmadvmoe.attacks import RoutePGD

    with pytest.raises(TypeError, match='got Linear'):
        RoutePGD(nn.Linear(2, 2))


def test_goes_on_after_it_fools(make_tiny):
    """Without routers that is PGD, on images that are wrong already as on others."""
    victim, images, labels = make_tiny(batch=24)
    common = dict(eps=0.03, alpha=0.008, steps=10)
    labels[:4] = (labels[:4] + 1) % 5
    adversarial = build_attack(dict(type='RoutePGD', stop_at_first=False, **common), victim)(images, labels, seed=1)
    expected = build_attack(dict(type='PGD', **common), victim)(images, labels, seed=1)
    torch.testing.assert_close(adversarial, expected)


def test_gives_the_most_wrong_of_its_runs(make_moe):
    victim = Victim(make_moe('image', 2).eval())
    images, labels = torch.rand(16, 3, 8, 8), torch.arange(16) % 4
    common = dict(eps=0.3, alpha=0.1, steps=4, random_start=False)

    def margins(kind, **more):
        logits = victim(build_attack(dict(type=kind, **common, **more), victim)(images, labels))
        own = logits.gather(1, labels[:, None])
        return (logits.scatter(1, labels[:, None], -torch.inf) - own).amax(1).detach()

    forced = [margins(ForcedRoutePGD, expert=n, stop_at_first=False) for n in range(2)]
    runs = torch.stack([margins('PGD', route='held'), *forced])
    torch.testing.assert_close(margins('RoutePGD', stop_at_first=False), runs.amax(0))
    assert len(set(runs.argmax(0).tolist())) > 1
