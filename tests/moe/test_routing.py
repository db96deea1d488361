import pytest
import torch

from mmadvmoe.moe import LayerRouter, ResNetRouter, Routing


def test_sorting_is_by_expert_stable_and_undone():
    expert = torch.tensor([2, 0, 1, 0, 2, 2])
    routing = Routing.fixed(expert, 4)
    assert routing.counts == (2, 1, 3, 0)
    assert expert[routing.order].tolist() == [0, 0, 1, 2, 2, 2]
    assert routing.order.tolist() == [1, 3, 2, 0, 4, 5]
    x = torch.randn(6, 2)
    assert torch.equal(routing.unsort(routing.sort(x)), x)


@pytest.mark.parametrize('gate', ['softmax', 'logit'])
def test_the_gate_is_exactly_one_and_carries_the_gradient_of_the_score(gate):
    logits = torch.randn(5, 3, requires_grad=True)
    routing = Routing.decide(logits, gate)
    assert torch.equal(routing.gate, torch.ones(5))
    scores = logits.softmax(dim=1) if gate == 'softmax' else logits
    (expected,) = torch.autograd.grad(scores.amax(dim=1).sum(), logits)
    (actual,) = torch.autograd.grad(routing.gate.sum(), logits)
    torch.testing.assert_close(actual, expected)


def test_the_softmax_gate_stays_bounded_where_the_raw_one_does_not():
    logits = torch.tensor([[1e18, -1e18]], requires_grad=True)
    for gate in ('softmax', 'logit'):
        assert Routing.decide(logits, gate).gate.item() == 1.0
    (gradient,) = torch.autograd.grad(Routing.decide(logits, 'softmax').gate.sum(), logits)
    assert gradient.abs().max() <= 0.25


def test_no_gate_where_no_gradient_is_wanted():
    assert Routing.decide(torch.randn(2, 2)).gate is None
    assert Routing.decide(torch.randn(2, 2, requires_grad=True), gate=None).gate is None


def test_a_routing_is_immutable():
    with pytest.raises(AttributeError):
        Routing.fixed(torch.zeros(2, dtype=torch.long), 2).expert = None


def test_the_image_router_has_the_shape_of_the_paper():
    router = ResNetRouter(num_experts=2)
    convolutions = [m for m in router.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == 19 and {m.out_channels for m in convolutions} == {16, 32, 64}
    # He et al., arXiv:1512.03385: 0.27 M parameters with 10 outputs.
    assert sum(p.numel() for p in ResNetRouter(num_experts=10).parameters()) == 269722
    assert router(torch.rand(2, 3, 32, 32)).shape == (2, 2)


def test_the_layer_router_reads_maps_tokens_and_vectors():
    maps, tokens = LayerRouter(3, 5), LayerRouter(3, 5, channels_last=True)
    assert maps(torch.rand(2, 5, 4, 4)).shape == (2, 3)
    x = torch.rand(2, 4, 4, 5)
    tokens.load_state_dict(maps.state_dict())
    torch.testing.assert_close(tokens(x), maps(x.permute(0, 3, 1, 2)))
    assert tokens(torch.rand(2, 5)).shape == (2, 3)


def test_a_router_of_one_expert_is_refused():
    with pytest.raises(ValueError, match='num_experts=1'):
        ResNetRouter(num_experts=1)
