import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.distributions import Categorical
from torch.distributions import kl_divergence as reference

from mmadvmoe.attacks import TRADESAttack, Victim, build_attack, kl_divergence


class LinearClassifier(nn.Module):
    def __init__(self, num_classes=3):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_classes, 3 * 4 * 4))

    def forward(self, x):
        return x.flatten(1) @ self.weight.T


def test_one_step_follows_the_gradient_computed_by_hand():
    model = LinearClassifier()
    victim = Victim(model)
    images = torch.rand(2, 3, 4, 4) * 0.5 + 0.25
    attack = build_attack(dict(type='TRADESAttack', eps=0.1, alpha=0.01, steps=1), victim)
    adversarial = attack(images, seed=3)
    torch.manual_seed(3)
    noisy = images + 0.001 * torch.randn_like(images)
    # d KL(p ‖ q) / d logits(q) = q - p, and the logits are linear in the image.
    p, q = victim(images).softmax(1), victim(noisy).softmax(1)
    grad = ((q - p) @ model.weight).view_as(images)
    torch.testing.assert_close(adversarial, noisy + 0.01 * grad.sign())


@pytest.mark.parametrize('norm', ['Linf', 'L2', 'L1'])
@pytest.mark.parametrize('steps', [1, 2, 7])
def test_raises_the_divergence_inside_the_ball(make_tiny, norm, steps):
    victim, images, _ = make_tiny()
    eps = dict(Linf=0.1, L2=1.0, L1=8.0)[norm]
    cfg = dict(type='TRADESAttack', eps=eps, alpha=eps / 2, steps=steps, norm=norm)
    adversarial = build_attack(cfg, victim)(images)
    offset = (adversarial.double() - images.double()).flatten(1)
    assert offset.norm(p=dict(Linf=float('inf'), L2=2, L1=1)[norm], dim=1).max() <= eps + 1e-6
    clean = victim(images)
    noisy = images + 0.001 * torch.randn_like(images)
    assert (kl_divergence(clean, victim(adversarial)) > 10 * kl_divergence(clean, victim(noisy))).all()


def test_router_weight_moves_the_router(make_moe):
    victim = Victim(make_moe().eval())
    images = torch.rand(8, 3, 8, 8)

    def moved(router_weight):
        cfg = dict(type='TRADESAttack', eps=0.1, alpha=0.02, steps=5, router_weight=router_weight)
        adversarial = build_attack(cfg, victim)(images, seed=0)
        (clean,), (attacked,) = (victim.forward_routed(x)[1] for x in (images, adversarial))
        return kl_divergence(clean.logits, attacked.logits).sum()

    assert moved(100.0) > 1.5 * moved(0.0)


@pytest.mark.parametrize('gated', [False, True])
def test_the_gate_is_in_the_gradient_only_on_request(make_moe, gated):
    """With hard routing the router gets a gradient from the class logits by the gate alone."""
    victim = Victim(make_moe().eval())
    images = torch.rand(4, 3, 8, 8)
    attack = TRADESAttack(victim, eps=0.1, alpha=0.02, steps=1, router_weight=0.0, gated=gated)
    seen = []
    handle = victim.classifier.backbone.router.register_full_backward_hook(
        lambda module, grad_in, grad_out: seen.append(grad_out[0].abs().sum().item())
    )
    attack(images)
    handle.remove()
    assert bool(seen) == gated
    assert all(gradient > 0 for gradient in seen)


def test_labels_of_any_kind_do_not_matter(make_tiny):
    victim, images, labels = make_tiny()
    attack = build_attack(dict(type='TRADESAttack'), victim)
    plain = attack(images, seed=1)
    torch.testing.assert_close(attack(images, labels, seed=1), plain, rtol=0, atol=0)
    soft = torch.full((4, 5), 0.2)
    torch.testing.assert_close(attack(images, soft, seed=1), plain, rtol=0, atol=0)


def test_refuses_a_start_without_gradient(make_tiny):
    victim, _, _ = make_tiny()
    with pytest.raises(ValueError, match='start_noise=0 must be above 0'):
        build_attack(dict(type='TRADESAttack', start_noise=0), victim)
    with pytest.raises(ValueError, match="norm='L3' is unknown"):
        build_attack(dict(type='TRADESAttack', norm='L3'), victim)


def _attack_shard(rank, world, store, results):
    torch.distributed.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=world)
    images, attack = _distributed_case()
    torch.manual_seed(7)
    adversarial = [attack(images[rank::world]) for _ in range(2)]
    seeded = attack(images[:2], seed=5)
    torch.save((adversarial, seeded, torch.rand(1)), f'{results}/{rank}.pt')
    torch.distributed.destroy_process_group()


def _distributed_case():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    victim = Victim(LinearClassifier())
    return torch.rand(6, 3, 4, 4), build_attack(dict(type='TRADESAttack', eps=0.1), victim)


def test_two_processes_attack_as_one(tmp_path):
    arguments = (2, tmp_path / 'store', tmp_path)
    other = mp.get_context('fork').Process(target=_attack_shard, args=(1, *arguments))
    other.start()
    _attack_shard(0, *arguments)
    other.join()
    shards = [torch.load(tmp_path / f'{rank}.pt') for rank in range(2)]
    images, attack = _distributed_case()
    torch.manual_seed(7)
    for call in range(2):
        whole = attack(images)
        merged = torch.stack([shard[0][call] for shard in shards], dim=1).flatten(0, 1)
        torch.testing.assert_close(merged, whole)
    # What follows in training is in step too; and a seed belongs to the images alone.
    assert shards[0][2] == shards[1][2] == torch.rand(1)
    for _, seeded, _ in shards:
        torch.testing.assert_close(seeded, attack(images[:2], seed=5), rtol=0, atol=0)


@pytest.mark.parametrize('shape', [(3, 5), (3, 4, 5)])
def test_divergence_equals_torch_distributions_per_image(shape):
    p, q = torch.randn(2, *shape)
    expected = reference(Categorical(logits=p), Categorical(logits=q)).view(3, -1).mean(1)
    torch.testing.assert_close(kl_divergence(p, q), expected)


def test_divergence_gradients_of_both_arguments():
    p, q = torch.randn(2, 3, 4, dtype=torch.float64).requires_grad_().unbind()
    p, q = p.detach().requires_grad_(), q.detach().requires_grad_()
    assert torch.autograd.gradcheck(kl_divergence, (p, q))


def test_divergence_full_precision_from_half():
    p, q = torch.randn(2, 3, 4, dtype=torch.bfloat16)
    result = kl_divergence(p, q)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, kl_divergence(p.float(), q.float()))


def test_divergence_far_apart_logits_stay_finite():
    p, q = torch.tensor([[1e6, 0.0]]), torch.tensor([[0.0, 1e6]])
    torch.testing.assert_close(kl_divergence(p, q), torch.tensor([1e6]))


def test_divergence_shapes_must_agree():
    with pytest.raises(ValueError, match=r'\(2, 3\) and \(2, 4\)'):
        kl_divergence(torch.zeros(2, 3), torch.zeros(2, 4))
