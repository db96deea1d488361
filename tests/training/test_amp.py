import pytest
import torch
from mmengine.optim import build_optim_wrapper
from tiny_runs import TurnRecorder, build_runner, run_cfg, turns_cfg
from torch import nn

from mmadvmoe.training import CPUAmpOptimWrapper


def test_computes_in_bfloat16_and_updates_float32_weights():
    model = nn.Linear(4, 4)
    wrapper = build_optim_wrapper(model, dict(type='CPUAmpOptimWrapper', optimizer=dict(type='SGD', lr=1e-4)))
    before = model.weight.detach().clone()
    with wrapper.optim_context(model):
        output = model(torch.ones(2, 4))
    assert output.dtype == torch.bfloat16
    assert model(torch.ones(2, 4)).dtype == torch.float32
    wrapper.update_params(output.float().sum())
    # A step this small would be lost in bfloat16 weights.
    assert torch.allclose(model.weight, before - 2e-4, atol=1e-6) and not model.weight.equal(before)


def test_other_types_are_refused():
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="dtype='float16'; allowed: 'bfloat16'"):
        CPUAmpOptimWrapper(dtype='float16', optimizer=optimizer)


def test_turns_hold_in_mixed_precision(tmp_path):
    cfg = run_cfg(tmp_path, epochs=1, optim_wrapper=turns_cfg(type='CPUAmpOptimWrapper'))
    runner, recorder = build_runner(cfg), TurnRecorder()
    runner.register_hook(recorder)
    runner.train()
    assert recorder.changed == [{'experts'}, {'router'}] * 2
    assert all(tensor.dtype == torch.float32 for tensor in runner.model.parameters())
