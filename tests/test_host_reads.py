"""How often the host waits for the device: in a forward pass, in attacks whose routes are held, in a training step."""

import pytest
import tiny_runs
import torch
from host_reads import HostReads
from small_mixtures import random_mixture
from tiny_models import make_classifier, make_data

from mmadvmoe.attacks import Pathway, build_attack
from mmadvmoe.moe import PLACEMENTS, placement_of


def reads_of(function, *args, **kwargs):
    with HostReads() as reads:
        function(*args, **kwargs)
    return reads.names


def test_the_counter_counts():
    x = torch.rand(4)

    def all_kinds():
        x[x > 0.5], x[0].item(), x.tolist(), x.cpu(), x.nonzero(), float(x[0]), x.to('cpu'), torch.tensor(3)
        if x[0] > 0.5 or True:
            pass
        x[x > 2] = x[:0]

    assert len(reads_of(all_kinds)) == 10
    assert not reads_of(lambda: (x[torch.arange(2)], x[1:], x.sum(), x * 2, x.to(torch.float64), len(x), x.shape))


@pytest.mark.parametrize(('routing', 'reads'), [('image', 1), ('layer', 8), ('token', 2)])
def test_a_forward_pass_reads_the_counts_of_each_router_once(routing, reads):
    victim = random_mixture(routing)
    assert victim.num_routers == reads
    images = torch.rand(6, 3, 8, 8)
    # The logits of routers for tokens are looked at once, all together.
    finite = 1 if routing == 'token' else 0
    with victim.frozen():
        assert len(reads_of(victim.forward_routed, images)) == reads + finite
        assert len(reads_of(victim, images)) == reads + finite
        route = torch.arange(6) % 3
        # Routers for tokens also ask whether the given experts exist and differ.
        assert len(reads_of(victim.forward_routed, images, route)) == reads * (3 if routing == 'token' else 1)
    # Without, the range of the images is looked at.
    assert len(reads_of(victim, images)) == reads + finite + 1


@pytest.mark.parametrize('routing', PLACEMENTS)
def test_the_routings_of_an_earlier_pass_are_a_route_that_costs_no_read(routing):
    victim = random_mixture(routing)
    images, moved = torch.rand(2, 6, 3, 8, 8)
    with torch.no_grad(), victim.frozen():
        _, routings = victim.forward_routed(images)
        given = torch.cat([routing.decisions for routing in routings], dim=1)
        expected, _ = victim.forward_routed(moved, given)
        with HostReads() as reads:
            logits, again = victim.forward_routed(moved, routings)
    assert not reads.names
    assert torch.equal(logits, expected)
    assert all(torch.equal(old.decisions, new.decisions) for old, new in zip(routings, again))
    assert all(new.gate is None for new in again) or routing == 'token'


def test_routings_that_do_not_fit_are_named():
    victim = random_mixture('layer')
    _, routings = victim.forward_routed(torch.rand(6, 3, 8, 8))
    with pytest.raises(ValueError, match='7 routings was given to 8 routers'):
        victim.forward_routed(torch.rand(6, 3, 8, 8), routings[:-1])
    with pytest.raises(ValueError, match='a routing of 6 images.* each of 5 images'):
        victim.forward_routed(torch.rand(5, 3, 8, 8), routings)


HELD = [
    ('PGD', dict()),
    ('PGD', dict(norm='L2', eps=0.5)),
    ('PGD', dict(norm='L1', eps=5.0)),
    ('BIM', dict()),
    ('MIFGSM', dict()),
]


@pytest.mark.parametrize('routing', PLACEMENTS)
@pytest.mark.parametrize(('kind', 'settings'), HELD, ids=lambda value: value if isinstance(value, str) else '')
def test_steps_with_the_route_held_read_nothing(routing, kind, settings):
    """As many reads with six steps as with two; `BIM` runs once for each route, so images of one route are taken."""
    victim = random_mixture(routing)
    images = torch.rand(1, 3, 8, 8).repeat(4, 1, 1, 1)
    labels = victim(images).argmax(1)
    counts = []
    for steps in (2, 6):
        attack = build_attack(dict(type=kind, route='held', steps=steps, **settings), victim)
        counts.append(len(reads_of(attack, images, labels, seed=0)))
    assert counts[0] == counts[1]


@pytest.mark.parametrize('routing', PLACEMENTS)
@pytest.mark.parametrize('kind', ['PGD', 'BIM'])
def test_attacks_on_a_pathway_read_nothing_after_the_first_step(routing, kind):
    pathway = Pathway(random_mixture(routing), 1)
    images = torch.rand(4, 3, 8, 8)
    labels = pathway(images).argmax(1)
    attacks = [build_attack(dict(type=kind, steps=steps), pathway) for steps in (2, 6)]
    assert len({len(reads_of(attack, images, labels, seed=0)) for attack in attacks}) == 1
    fresh = Pathway(pathway.model, 1)
    with fresh.frozen():
        assert len(reads_of(fresh, images)) > 0 and not reads_of(fresh, images)
    assert torch.equal(fresh(images), Pathway(pathway.model, 1)(images))


@pytest.mark.parametrize('top_k', [1, 2])
def test_a_pathway_of_tokens_with_second_experts_chooses_them_in_each_pass(top_k):
    victim = random_mixture('token')
    for layer in victim.classifier.backbone.expert_layers():
        layer.router.top_k = top_k
    pathway = Pathway(victim, 0)
    for images in torch.rand(2, 4, 3, 8, 8):
        route = torch.zeros(4, dtype=torch.long)
        expected = victim.forward_routed(images, route, with_logits=False, gated=False)[0]
        assert torch.equal(pathway(images), expected)


def test_the_checks_of_a_batch_take_one_read_before_and_one_after_the_attack():
    model = make_classifier()
    attack = build_attack(dict(type='PGD', steps=3), torch.nn.Sequential(model.backbone.conv1, torch.nn.Flatten()))
    images, labels = torch.rand(4, 3, 8, 8), torch.arange(4)
    assert reads_of(attack, images, labels) == ['tolist', '__bool__']


def test_a_training_step_reads_counts_checks_and_one_set_of_values(monkeypatch, tmp_path):
    """Forward passes: one for the clean images and one for each step of the attack, then two of the loss."""
    steps = 2
    model = tiny_runs.model_cfg(
        data_preprocessor=dict(attack=dict(type='TRADESAttack', steps=steps), mode='pair'),
        router_loss=[dict(type='TRADESLoss'), dict(type='RouterBalanceLoss'), dict(type='RouterKLLoss')],
    )
    runner = tiny_runs.build_runner(tiny_runs.run_cfg(tmp_path, model=model, hooks=[dict(type='RouterHealthHook')]))
    assert placement_of(runner.model).one_route_per_image
    passes = 1 + steps + 2
    # Of a batch before and after its attack, of losses and router logits, of gradients. MMEngine looks at the sizes of
    # images, which it has on the host.
    checks = dict(attack=2, finite=1, gradients=1, sizes=1)
    counts = []
    train_step = type(runner.model).train_step

    def counted(self, *args, **kwargs):
        with HostReads() as reads:
            outputs = train_step(self, *args, **kwargs)
        counts.append(len(reads))
        return outputs

    monkeypatch.setattr(type(runner.model), 'train_step', counted)
    runner.train()
    assert set(counts) == {passes + sum(checks.values())}


def test_values_for_the_log_are_read_at_once():
    from mmadvmoe.training.alternation import _named_by_turn

    outputs = dict(loss=torch.tensor(1.5), loss_robust=torch.tensor(0.1), note='x', count=3)
    with HostReads() as reads:
        named = _named_by_turn(outputs, 'experts')
    assert reads.names == ['tolist']
    assert named == {
        'experts/loss': 1.5,
        'experts/loss_robust': torch.tensor(0.1).item(),
        'experts/note': 'x',
        'experts/count': 3,
    }


def test_losses_are_checked_in_one_read():
    model = make_classifier(moe=True, attack=dict(type='FGSM'))
    data = model.data_preprocessor(make_data(), training=True)
    reads = reads_of(model.loss, **data)
    assert len(reads) == 3, 'the counts of two passes, and whether all is finite'
