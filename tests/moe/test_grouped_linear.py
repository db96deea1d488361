import pytest
import torch
import torch.nn.functional as F

from mmadvmoe.moe.token_routing import GroupSizes, _one_product, _products, grouped_linear, take_rows

LOAD = torch.tensor([5, 0, 3, 8])
SIZES = GroupSizes(LOAD)


def operands(dtype, bias=True, grads=(True, True, True)):
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 8), (4 * 24, 8), (4 * 24,)][: 2 + bias]
    drawn = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [item.requires_grad_(flag) for item, flag in zip(drawn, grads)]


def plain(x, weight, bias=None):
    parts = zip(x.split(LOAD.tolist()), weight.chunk(4), bias.chunk(4) if bias is not None else [None] * 4, strict=True)
    return torch.cat([F.linear(part, own, offset) for part, own, offset in parts])


# The kernel for CUDA has a fallback on CPU, in all but float64.
@pytest.mark.parametrize(
    ('kernel', 'dtype', 'tolerance'),
    [(_products, torch.float64, 1e-12), (_one_product, torch.float32, 1e-5), (_one_product, torch.bfloat16, 2e-2)],
)
@pytest.mark.parametrize('bias', [True, False])
def test_both_kernels_equal_one_linear_layer_per_expert(kernel, dtype, tolerance, bias):
    ours, theirs = operands(dtype, bias), operands(dtype, bias)
    out = kernel(*ours, *[None] * (not bias), SIZES)
    expected = plain(*theirs)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for result in (out, expected):
        result.backward(seed)
    for mine, reference in zip(ours, theirs):
        scale = reference.grad.abs().max().item()
        torch.testing.assert_close(mine.grad, reference.grad, rtol=tolerance, atol=tolerance * scale)


def test_an_attack_keeps_no_input_and_gets_no_gradient_of_weights():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        x, weight, bias = operands(torch.float32, grads=(True, False, False))
        grouped_linear(x, weight, bias, SIZES).sum().backward()
    assert kept == [(8, 24)] * 4  # the weight of each expert
    assert x.grad is not None and weight.grad is None and bias.grad is None


def test_autocast_decides_the_type():
    x, weight, bias = operands(torch.float32)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = grouped_linear(x, weight, bias, SIZES)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(item.grad.dtype == torch.float32 for item in (x, weight, bias))


@pytest.mark.parametrize('dropped', [False, True])
def test_rows_are_taken_with_the_gradient_of_indexing(dropped):
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    take = torch.tensor([2, 0, 3, 1, 1, 0, 3, 2])  # each row twice
    back = torch.stack([(take == row).nonzero().squeeze(1) for row in range(4)], dim=1).flatten()
    kept = torch.tensor([True] * 5 + [False] * 3) if dropped else None
    counted = torch.ones(8, dtype=torch.bool)
    if dropped:
        counted[back[~kept]] = False
    out = take_rows(x, take, back, kept)
    assert torch.equal(out, x[take])
    seed = torch.randn(8, 3, dtype=torch.float64)
    (ours,) = torch.autograd.grad((out * seed).sum(), x)
    (theirs,) = torch.autograd.grad((x[take] * seed)[counted].sum(), x)
    torch.testing.assert_close(ours, theirs)
