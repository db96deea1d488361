from pathlib import Path

import pytest
from mmengine.config import Config
from mmpretrain.registry import MODELS
from tiny_runs import build_runner, group_cfg, model_cfg, run_cfg

import mmadvmoe  # noqa: F401
from mmadvmoe.runtime import check_config
from mmadvmoe.runtime.config_checks import check_options, keywords_named

CONFIGS = Path(__file__).parents[2] / 'configs'


@pytest.mark.parametrize(
    ('key', 'message'),
    [
        ('modle.head.num_classes', r"modle\.head\.num_classes: nothing reads 'modle' \(did you mean 'model'\?\)"),
        ('trian_cfg.max_epochs', r"'trian_cfg' \(did you mean 'train_cfg'\?\)"),
        ('ressume', r"'ressume' \(did you mean 'resume'\?\)"),
    ],
)
def test_options_about_nothing_are_refused(key, message):
    cfg = Config.fromfile(CONFIGS / 'advmoe_resnet18_digits.py')
    with pytest.raises(ValueError, match=message):
        check_options({'load_from': 'x', key: 1}, cfg)


def test_options_about_what_is_there_or_read_pass():
    cfg = Config.fromfile(CONFIGS / 'advmoe_resnet18_digits.py')
    check_options({'model.anything': 1, 'auto_scale_lr.enable': True, 'sync_bn': 'torch'}, cfg)


def test_a_name_that_the_config_file_has_read_already_is_refused():
    cfg = Config.fromfile(CONFIGS / 'advmoe_resnet18_digits.py')
    with pytest.raises(ValueError, match=r"has read 'train_attack' already; set model\.data_preprocessor\.attack\.eps"):
        check_options({'train_attack.eps': 0.1}, cfg)
    cfg = Config(dict(mine=3, part=dict(a=1), model=dict(depth=3, heads=[dict(a=1)]), mean=[1.0], optim_wrapper=dict()))
    check_options({'mine': 4, 'mean': [2.0]}, cfg)  # read by a hook of the user, perhaps
    with pytest.raises(ValueError, match=r'has read .part. already; set model\.heads\.0\.a instead'):
        check_options({'part.a': 2}, cfg)


def test_a_keyword_that_nothing_takes_is_named_by_its_place():
    model = model_cfg(head=dict(type='LinearClsHead', num_classes=3, in_chanels=4, in_channels=4))
    cfg = Config(dict(model=model, hooks=[dict(a=1), dict(in_chanels=2)]))
    with pytest.raises(TypeError, match=r'config has model\.head\.in_chanels and hooks\[1\]\.in_chanels, .*ClsHead'):
        with keywords_named(cfg):
            MODELS.build(cfg.model)
    for error in (TypeError('something else'), TypeError("unexpected keyword argument 'nowhere'")):
        with pytest.raises(TypeError) as caught, keywords_named(cfg):
            raise error
        assert caught.value is error


def test_a_schedule_that_begins_after_the_training_is_named():
    cfg = Config.fromfile(CONFIGS / 'advmoe_vit-small-moe_digits.py')
    check_config(cfg)
    cfg.train_cfg.max_epochs = 5
    with pytest.raises(
        ValueError,
        match=r'param_scheduler\.experts: CosineAnnealingLR begins after 5 epochs .* training is 5 epochs long '
        r'\(train_cfg\.max_epochs\); before it LinearLR takes 5 epochs',
    ):
        check_config(cfg)
    by_iter = dict(type='LinearLR', by_epoch=False, begin=10)
    with pytest.raises(ValueError, match=r'param_scheduler: LinearLR begins after 10 iterations'):
        check_config(dict(param_scheduler=by_iter, train_cfg=dict(max_iters=10)))
    check_config(dict(param_scheduler=by_iter, train_cfg=dict(max_epochs=1)))


def test_a_hook_that_begins_after_the_training_is_named():
    cfg = Config.fromfile(CONFIGS / 'advmoe_resnet18_digits_ema.py')
    check_config(cfg)
    cfg.train_cfg.max_epochs = 2
    with pytest.raises(ValueError, match=r'custom_hooks: EMAHook begins .* begin_epoch=\d+ and .*\.max_epochs=2; set'):
        check_config(cfg)


@pytest.mark.parametrize('joint', [True, False])
def test_a_run_that_is_made_longer_is_warned_of_its_old_schedule(tmp_path, joint):
    cosine = dict(type='CosineAnnealingLR', eta_min=1e-3, by_epoch=True, convert_to_iter_based=True)

    def run(name, epochs, scheduler=cosine, **kwargs):
        hooks = [dict(type='PreflightHook')]
        if joint:
            kwargs |= dict(optim_wrapper=group_cfg(), custom_hooks=hooks)
        runner = build_runner(
            run_cfg(
                tmp_path / name,
                hooks=hooks,
                epochs=epochs,
                param_scheduler=scheduler,
                default_hooks=dict(checkpoint=dict(type='SafeCheckpointHook', interval=1)),
                **kwargs,
            )
        )
        warnings = []
        runner.logger.warning = warnings.append
        runner.train()
        return [text for text in warnings if 'resumed ends' in text]

    assert run('first', 1) == []
    checkpoint = dict(resume=True, load_from=str(tmp_path / 'first' / 'epoch_1.pth'))
    warnings = run('longer', 2, **checkpoint)
    keys = ['param_scheduler'] if joint else ['param_scheduler.experts', 'param_scheduler.router']
    assert [text.split(':')[0] for text in warnings] == keys
    assert 'ends after 4 iterations, and training now goes on to 8: lr stays where it ends' in warnings[0]
    assert run('same', 1, **checkpoint) == []
