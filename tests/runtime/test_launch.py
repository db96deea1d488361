"""From arguments and config files to what the Runner is built from."""

import argparse

import pytest
from mmengine.config import Config
from mmengine.optim import OptimWrapper

from mmadvmoe.runtime.launch import (
    add_common_arguments,
    check_checkpoint,
    enable_amp,
    load_config,
    merge_common_arguments,
)

SGD = dict(type='SGD', lr=0.1)


def merged(cfg, *arguments, loaders=('train_dataloader', 'val_dataloader')):
    parser = argparse.ArgumentParser()
    parser.add_argument('config')
    add_common_arguments(parser)
    cfg = Config(cfg)
    merge_common_arguments(cfg, parser.parse_args(['configs/some.py', *arguments]), loaders)
    return cfg


def alternating(**router):
    return Config(
        dict(
            optim_wrapper=dict(
                constructor='AlternatingOptimWrapperConstructor',
                experts=dict(type='OptimWrapper', optimizer=SGD, clip_grad=dict(max_norm=1)),
                router=dict(dict(optimizer=SGD), **router),
                paramwise_cfg=dict(norm_decay_mult=0.0),
            )
        )
    )


def test_amp_wraps_both_optimizers_for_the_cpu(monkeypatch):
    monkeypatch.setattr('mmadvmoe.runtime.launch.get_device', lambda: 'cpu')
    cfg = alternating(type='AmpOptimWrapper', loss_scale=128.0)
    enable_amp(cfg)
    assert cfg.optim_wrapper.to_dict() == dict(
        constructor='AlternatingOptimWrapperConstructor',
        experts=dict(type='CPUAmpOptimWrapper', optimizer=SGD, clip_grad=dict(max_norm=1)),
        router=dict(type='CPUAmpOptimWrapper', optimizer=SGD),
        paramwise_cfg=dict(norm_decay_mult=0.0),
    )


def test_amp_wraps_both_optimizers_for_the_gpu(monkeypatch):
    monkeypatch.setattr('mmadvmoe.runtime.launch.get_device', lambda: 'cuda')
    cfg = alternating(loss_scale=128.0)
    enable_amp(cfg)
    experts, router = cfg.optim_wrapper.experts, cfg.optim_wrapper.router
    assert (experts.type, experts.loss_scale) == ('AmpOptimWrapper', 'dynamic')
    assert (router.type, router.loss_scale) == ('AmpOptimWrapper', 128.0)
    assert 'type' not in cfg.optim_wrapper


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_amp_with_one_optimizer(monkeypatch, device):
    monkeypatch.setattr('mmadvmoe.runtime.launch.get_device', lambda: device)
    cfg = Config(dict(optim_wrapper=dict(optimizer=SGD)))
    enable_amp(cfg)
    expected = {
        'cpu': dict(type='CPUAmpOptimWrapper', optimizer=SGD),
        'cuda': dict(type='AmpOptimWrapper', optimizer=SGD, loss_scale='dynamic'),
    }
    assert cfg.optim_wrapper == expected[device]


@pytest.mark.parametrize('kind', [OptimWrapper, 'mmengine.OptimWrapper'])
def test_amp_knows_wrappers_that_are_given_as_classes(monkeypatch, kind):
    monkeypatch.setattr('mmadvmoe.runtime.launch.get_device', lambda: 'cpu')
    cfg = Config(dict(optim_wrapper=dict(type=kind, optimizer=SGD)))
    enable_amp(cfg)
    assert cfg.optim_wrapper.type == 'CPUAmpOptimWrapper'


def test_amp_refuses_what_it_would_lose():
    with pytest.raises(ValueError, match="optim_wrapper.router.type='ApexOptimWrapper'"):
        enable_amp(alternating(type='ApexOptimWrapper'))
    with pytest.raises(ValueError, match='optim_wrapper has none'):
        enable_amp(Config(dict(optim_wrapper=dict(type='OptimWrapper'))))


def test_missing_files_are_named(tmp_path):
    (tmp_path / 'advmoe_digits.py').write_text('seed = 3')
    assert load_config(str(tmp_path / 'advmoe_digits.py')).seed == 3
    # With nothing below it to delete, MMEngine would hand it to a constructor.
    (tmp_path / 'child.py').write_text("_base_ = 'advmoe_digits.py'\nhook = [dict(a=dict(_delete_=True, type='A'))]\n")
    assert load_config(str(tmp_path / 'child.py')).hook == [dict(a=dict(type='A'))]
    with pytest.raises(FileNotFoundError, match=r'advmo_digits.py.*mean .advmoe_digits.py.\?'):
        load_config(str(tmp_path / 'advmo_digits.py'))
    with pytest.raises(FileNotFoundError, match='nowhere/a.py'):
        load_config('nowhere/a.py')
    with pytest.raises(FileNotFoundError, match="--resume: checkpoint .*epoch_1.pth' does not"):
        check_checkpoint(str(tmp_path / 'epoch_1.pth'), '--resume')
    check_checkpoint('https://example.com/epoch_1.pth', '--resume')


def test_loader_defaults_give_way_to_config_and_options():
    cfg = merged(
        dict(
            train_dataloader=dict(batch_size=4, pin_memory=True),
            val_dataloader=dict(collate_fn=dict(type='pseudo_collate')),
        ),
        '--no-pin-memory',
        '--cfg-options',
        'train_dataloader.pin_memory=True',
        'train_dataloader.batch_size=8',
    )
    train, val = cfg.train_dataloader, cfg.val_dataloader
    assert (train.batch_size, train.pin_memory, val.pin_memory) == (8, True, False)
    assert train.collate_fn == dict(type='default_collate')
    assert val.collate_fn == dict(type='pseudo_collate')
    # Workers that are kept would make an exact resume impossible.
    assert not train.get('persistent_workers') and not val.get('persistent_workers')


def test_no_pin_memory_and_absent_loaders():
    cfg = merged(dict(train_dataloader=dict(pin_memory=True), val_dataloader=None), '--no-pin-memory')
    assert cfg.train_dataloader.pin_memory is False
    assert cfg.val_dataloader is None


def test_work_dir_comes_from_argument_then_config_then_name():
    assert merged({}).work_dir == 'work_dirs/some'
    assert merged(dict(work_dir='here')).work_dir == 'here'
    assert merged(dict(work_dir='here'), '--work-dir', 'there').work_dir == 'there'
