"""Training on a GPU: in turns, in mixed precision, resumed, on several processes."""

import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from processes import start
from tiny_runs import TurnRecorder, build_runner, group_cfg, run_cfg, turns_cfg

from mmadvmoe.runtime.launch import enable_amp, finish_distributed, prepare_distributed

SAVER = dict(
    checkpoint=dict(type='SafeCheckpointHook', interval=1, save_best=None), logger=dict(type='LoggerHook', interval=1)
)


@pytest.fixture(autouse=True)
def _place(device, monkeypatch):
    """MMEngine trains on a GPU wherever there is one."""
    if device.type == 'cpu' and torch.cuda.is_available():
        monkeypatch.setattr('mmengine.device.utils.DEVICE', 'cpu')


def weights_of(runner):
    return {name: value.detach().cpu().clone() for name, value in runner.model.state_dict().items()}


@pytest.mark.parametrize('schedule', [dict(), dict(reuse_batch=True)], ids=['new batch', 'reuse batch'])
def test_turns_move_their_own_group_alone(device, tmp_path, schedule):
    recorder = TurnRecorder()
    runner = build_runner(run_cfg(tmp_path, schedule, epochs=1))
    runner.register_hook(recorder)
    runner.train()
    assert next(runner.model.parameters()).device.type == device.type
    if schedule:
        assert recorder.changed == [{'experts', 'router'}] * 4
    else:
        assert recorder.changed == [{'experts'}, {'router'}] * 2


def amp_cfg(tmp_path, **settings):
    cfg = run_cfg(tmp_path, epochs=1)
    cfg.optim_wrapper.experts.update(settings)
    enable_amp(cfg)
    return cfg


def test_mixed_precision_with_two_optimizers(device, tmp_path):
    recorder = TurnRecorder()
    runner = build_runner(amp_cfg(tmp_path))
    runner.register_hook(recorder)
    runner.train()
    kind = 'AmpOptimWrapper' if device.type == 'cuda' else 'CPUAmpOptimWrapper'
    assert {type(wrapper).__name__ for wrapper in runner.optim_wrapper.values()} == {kind}
    assert all(value.isfinite().all() for value in weights_of(runner).values())
    assert {'experts'} in recorder.changed


class Overflow(Hook):
    """Makes the gradients of one turn infinite."""

    priority = 'VERY_LOW'

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        group = runner.optim_wrapper.active_name
        for parameter in runner.optim_wrapper[group].optimizer.param_groups[0]['params'][:1]:
            handle = parameter.register_hook(lambda grad: grad * float('inf'))
            self.handle = handle

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.handle.remove()


def test_an_overflow_skips_the_step_and_lowers_the_scale_of_its_group(device, tmp_path):
    if device.type != 'cuda':
        pytest.skip('losses are scaled on a GPU alone')
    recorder = TurnRecorder()
    cfg = amp_cfg(tmp_path)
    for group in ('experts', 'router'):
        cfg.optim_wrapper[group].update(dtype='float16', loss_scale=dict(init_scale=256.0))
    cfg.train_cfg.max_epochs = 1
    runner = build_runner(cfg)
    runner.register_hook(Overflow())
    runner.model.init_weights()
    before = {name: p.detach().clone() for name, p in runner.model.named_parameters()}
    runner.register_hook(recorder)
    runner.train()
    after = dict(runner.model.named_parameters())
    assert all(torch.equal(before[name], after[name].cpu().to(before[name])) for name in before)
    assert all(w.loss_scaler.get_scale() < 256 for w in runner.optim_wrapper.values())


def test_accumulation_with_two_optimizers(device, tmp_path):
    recorder = TurnRecorder()
    runner = build_runner(run_cfg(tmp_path, epochs=1, optim_wrapper=turns_cfg(accumulative_counts=2)))
    runner.register_hook(recorder)
    runner.train()
    # Norm statistics move in each iteration, weights in every second one of a group.
    assert recorder.changed == [{'experts'}, {'experts'}, {'router'}, {'router'}]


@pytest.mark.parametrize('kind', ['AdamW', 'SGD'])
def test_fused_optimizers(device, tmp_path, kind):
    group = group_cfg(optimizer=dict(type=kind, lr=1e-3, fused=True))
    optim = dict(constructor='AlternatingOptimWrapperConstructor', experts=group, router=dict(group))
    runner = build_runner(run_cfg(tmp_path, epochs=1, optim_wrapper=optim))
    runner.train()
    assert all(value.isfinite().all() for value in weights_of(runner).values())


def deterministic(tmp_path, **overrides):
    cfg = run_cfg(tmp_path, epochs=2, default_hooks=SAVER, randomness=dict(seed=1, deterministic=True), **overrides)
    cfg.custom_hooks = [*cfg.custom_hooks, dict(type='ExactResumeHook')]
    return cfg


def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(device, tmp_path):
    try:
        whole = build_runner(deterministic(tmp_path / 'whole'))
        whole.train()
        half = deterministic(tmp_path / 'half')
        half.train_cfg.max_epochs = 1
        build_runner(half).train()
        resumed = build_runner(deterministic(tmp_path / 'half', resume=True))
        resumed.train()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
    assert resumed.iter == whole.iter == 8
    for name, value in weights_of(whole).items():
        assert torch.equal(weights_of(resumed)[name], value), name


def test_training_is_that_of_the_cpu_at_first(device, tmp_path, monkeypatch):
    """Two updates of each group, from the same weights on the same batches."""
    runner = build_runner(run_cfg(tmp_path / 'there', epochs=1))
    runner.model.init_weights()  # which a training would do now, in the order of the device's random numbers
    start_weights = weights_of(runner)
    runner.train()
    here = weights_of(runner)
    monkeypatch.setattr('mmengine.device.utils.DEVICE', 'cpu')
    plain = build_runner(run_cfg(tmp_path / 'cpu', epochs=1))
    plain.model.init_weights()
    plain.model.load_state_dict(start_weights)
    plain.train()
    moved = [name for name, value in weights_of(plain).items() if not torch.equal(value, start_weights[name])]
    assert moved
    # FGSM takes signs, of which a few are a matter of rounding.
    for name in moved:
        torch.testing.assert_close(here[name].float(), weights_of(plain)[name].float(), rtol=0.1, atol=0.1)


@pytest.mark.parametrize('processes', [1, 2])
def test_processes_train_the_same_weights(device, tmp_path, processes):
    """With NCCL, one process a GPU; with gloo on the CPU."""
    if device.type == 'cuda' and torch.cuda.device_count() < processes:
        pytest.skip(f'{processes} processes need as many GPUs')
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(processes)]
    variables = {} if device.type == 'cpu' else dict(CUDA_VISIBLE_DEVICES=','.join(map(str, range(processes))))
    process = start([*torchrun, __file__], tmp_path, **variables)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    ranks = [torch.load(tmp_path / f'{rank}.pth', map_location='cpu', weights_only=True) for rank in range(processes)]
    assert {rank['backend'] for rank in ranks} == {'nccl' if device.type == 'cuda' else 'gloo'}
    for name, value in ranks[0]['weights'].items():
        assert torch.equal(value, ranks[-1]['weights'][name]), name


def main(folder: Path) -> None:
    environment = Config(dict(env_cfg=dict(dist_cfg=dict(timeout=120, backend='nccl'))))
    prepare_distributed(environment, 'pytorch')
    cfg = run_cfg(folder / 'run', epochs=1)
    cfg.merge_from_dict({key: environment[key] for key in environment if key != 'custom_hooks'})
    cfg.custom_hooks = [*cfg.custom_hooks, dict(type='SyncBuffersHook')]
    runner = build_runner(cfg)
    runner.train()
    torch.save(
        dict(weights=runner.model.module.state_dict(), backend=torch.distributed.get_backend()),
        folder / f'{runner.rank}.pth',
    )
    finish_distributed()


if __name__ == '__main__':
    main(Path(sys.argv[1]))
