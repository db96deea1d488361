import re

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmpretrain.datasets import build_dataset
from mmpretrain.models import ImageClassifier
from mmpretrain.registry import DATASETS, HOOKS, MODELS
from tiny_runs import CLASSES, RandomImages, build_runner, group_cfg, model_cfg, run_cfg, turns_cfg
from torch.utils.data import ConcatDataset, Dataset, Subset

import mmadvmoe  # noqa: F401
from mmadvmoe.cost import count_cost
from mmadvmoe.models import AdvDataPreprocessor, RobustClassifier
from mmadvmoe.moe import router_modules
from mmadvmoe.runtime import PreflightHook, check_config
from mmadvmoe.runtime.preflight import check_data

FGSM = dict(type='FGSM', eps=8 / 255)


@DATASETS.register_module()
class OddImages(RandomImages):
    """Sixteen images, of which the last has another size, another label or another scale."""

    def __init__(self, odd, size=16, tells_labels=False):
        super().__init__(size)
        self.odd = odd
        if tells_labels:
            self.get_cat_ids = lambda index: [self[index]['data_samples'].gt_label.item()]

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        torch.rand(1)  # as an augmentation would draw
        if index == len(self) - 1 and self.odd == 'size':
            sample['inputs'] = torch.zeros(3, 9, 8, dtype=torch.uint8)
        if index == len(self) - 1 and self.odd == 'label':
            sample['data_samples'].set_gt_label(CLASSES)
        if self.odd == 'grey':
            sample['inputs'] = sample['inputs'][:1]
        if self.odd == 'scale':
            sample['inputs'] = sample['inputs'] / 255
        return sample


@HOOKS.register_module()
class CountHook(Hook):
    """Counts the checks, and notes what the first iteration would draw."""

    def before_run(self, runner):
        (hook,) = [hook for hook in runner.hooks if isinstance(hook, PreflightHook)]
        before_train, self.checks = hook.before_train, 0

        def counted(runner):
            self.checks += 1
            state = torch.get_rng_state()
            before_train(runner)
            assert torch.get_rng_state().equal(state)

        hook.before_train = counted

    def after_train(self, runner):
        CountHook.total = self.checks


def loader(dataset, batch_size=4, **kwargs):
    return (
        dict(dataset=dataset, batch_size=batch_size, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=True))
        | kwargs
    )


def joint_cfg(tmp_path, model=None, hooks=(), **overrides):
    hooks = [dict(type='PreflightHook'), *hooks]
    cfg = dict(model=model or model_cfg(), optim_wrapper=group_cfg(), custom_hooks=hooks)
    return run_cfg(tmp_path, **cfg | overrides)


def stopped(cfg, error=ValueError):
    """The message with which a run stops before its first iteration."""
    runner = build_runner(cfg)
    with pytest.raises(error) as caught:
        runner.train()
    assert runner.iter == 0
    return str(caught.value)


def with_validation(**dataset):
    return dict(
        val_dataloader=loader(dataset),
        val_cfg=dict(),
        val_evaluator=dict(type='Accuracy'),
    )


def test_a_sound_run_is_checked_once_and_draws_the_same_numbers(tmp_path):
    cfg = joint_cfg(
        tmp_path,
        hooks=[dict(type='CountHook')],
        train_dataloader=loader(dict(type='OddImages', odd=None, tells_labels=True)),
        **with_validation(type='RandomImages'),
    )
    build_runner(cfg).train()
    assert CountHook.total == 1


def test_a_resumed_run_is_checked_too(tmp_path):
    checkpoint = dict(default_hooks=dict(checkpoint=dict(type='SafeCheckpointHook', interval=1)))
    build_runner(joint_cfg(tmp_path, epochs=1, **checkpoint)).train()
    cfg = joint_cfg(tmp_path, resume=True, load_from=str(tmp_path / 'epoch_1.pth'), **checkpoint)
    cfg.train_dataloader.dataset = dict(type='OddImages', odd='label')
    with pytest.raises(ValueError, match=r'labels \[3\]'):
        build_runner(cfg).train()


REPLACE = dict(type='AdvDataPreprocessor', attack=FGSM, mode='replace')
PAIR = dict(type='AdvDataPreprocessor', attack=FGSM)


def classifier(preprocessor):
    model = model_cfg(type='ImageClassifier', data_preprocessor=preprocessor)
    del model['robust_loss']
    return model


@pytest.mark.parametrize(
    ('model', 'hooks', 'message'),
    [
        (classifier(PAIR), ['BindVictimHook'], r"mode='pair' hands adv_inputs to ImageClassifier, .*mode='replace'"),
        (classifier(REPLACE), [], r"no victim to attack: use a RobustClassifier, or .*'BindVictimHook'"),
        (
            model_cfg(data_preprocessor=REPLACE),
            [],
            r"mode='replace' takes the clean images away from RobustClassifier, .*mode='pair'",
        ),
        (model_cfg(data_preprocessor=None), [], r'data_preprocessor\.attack is missing'),
        (model_cfg(data_preprocessor=dict(type='ClsDataPreprocessor')), [], r'data_preprocessor\.attack is missing'),
    ],
    ids=['ignores-pairs', 'no-victim', 'no-clean', 'no-attack', 'other-preprocessor'],
)
def test_model_and_attack_must_fit(tmp_path, model, hooks, message):
    cfg = joint_cfg(tmp_path, model, hooks=[dict(type=name) for name in hooks])
    assert re.search(message, stopped(cfg))


TEN = dict(type='Digits', split='val', pipeline=[dict(type='PackInputs')])
THREE = dict(TEN, metainfo=dict(classes=tuple('abc')))


@pytest.mark.parametrize(
    ('dataset', 'loader_kwargs', 'message'),
    [
        (dict(type='RandomImages'), dict(batch_size=1), r'train_dataloader\.batch_size=1: .*at least 2'),
        (
            dict(type='RandomImages', size=9),
            {},
            r'batch_size=4 leaves a last batch of a single image out of 9; set .*drop',
        ),
        (dict(type='RandomImages', size=3), dict(drop_last=True), r'batch_size=4 is more than the 3 images'),
        (dict(type='OddImages', odd='size'), {}, r'differ in size: .*8, 8.*9, 8.*train_dataloader\.dataset\.pipeline'),
        (dict(type='OddImages', odd='scale'), {}, r'expects 0\.\.255.*train_dataloader\.dataset\.pipeline'),
        (
            dict(type='OddImages', odd='label'),
            {},
            r'\(OddImages\) has labels \[3\] outside \[0, 3\).*head\.num_classes',
        ),
        # Too many to read them all: a data set tells its labels, also inside of wrappers.
        (
            dict(type='RepeatDataset', times=2, dataset=THREE),
            {},
            r'\(RepeatDataset\) has labels \[3, 4, 5, 6, 7\] outside',
        ),
        (
            dict(type='ConcatDataset', datasets=[THREE, THREE]),
            {},
            r'\(ConcatDataset\) has labels \[3, 4, 5, 6, 7\] outside',
        ),
        (TEN, {}, r'num_classes=3 differs from the 10 classes of train_dataloader\.dataset \(Digits\)'),
    ],
    ids=['one-image', 'last-image', 'too-few', 'sizes', 'scale', 'label', 'repeated', 'joined', 'classes'],
)
def test_data_must_fit_the_model(tmp_path, dataset, loader_kwargs, message):
    assert re.search(message, stopped(joint_cfg(tmp_path, train_dataloader=loader(dataset, **loader_kwargs))))


@pytest.mark.parametrize(
    ('dataset', 'message'),
    [
        (dict(type='OddImages', odd='label'), r'val_dataloader\.dataset \(OddImages\) has labels \[3\]'),
        (dict(type='OddImages', odd='size'), r'differ in size.*val_dataloader\.dataset\.pipeline'),
        (TEN, r'num_classes=3 differs from the 10 classes of val_dataloader\.dataset'),
    ],
)
def test_data_of_validation_must_fit_too(tmp_path, dataset, message):
    assert re.search(message, stopped(joint_cfg(tmp_path, **with_validation(**dataset))))


@pytest.mark.parametrize(
    'cfg',
    [
        dict(train_dataloader=loader(dict(type='RandomImages', size=9), drop_last=True)),
        # An endless sampler has no last batch.
        dict(
            train_dataloader=loader(
                dict(type='RandomImages', size=9), sampler=dict(type='InfiniteSampler'), batch_size=4
            ),
            train_cfg=dict(by_epoch=False, max_iters=4),
        ),
        dict(model=classifier(dict(type='ClsDataPreprocessor', mean=[0.0], std=[255.0]))),
    ],
    ids=['drop-last', 'endless', 'no-attack-at-all'],
)
def test_what_is_right_is_left_alone(tmp_path, cfg):
    build_runner(joint_cfg(tmp_path, epochs=1, **cfg)).train()


def test_classes_of_the_preprocessor_must_be_those_of_the_head(tmp_path):
    model = model_cfg(data_preprocessor=dict(PAIR, num_classes=10))
    message = stopped(joint_cfg(tmp_path, model))
    assert 'model.head.num_classes=3 differs from data_preprocessor.num_classes=10' in message
    build_runner(joint_cfg(tmp_path, model_cfg(data_preprocessor=dict(PAIR, num_classes=CLASSES)), epochs=1)).train()


def test_images_smaller_than_the_strides_are_named(tmp_path):
    """A backbone of MMPretrain, which does not check its images."""
    backbone = dict(type='DenseNet', arch=dict(growth_rate=2, depths=[1, 1, 1], init_channels=4))
    model = model_cfg(backbone=backbone, head=dict(type='LinearClsHead', num_classes=CLASSES, in_channels=5))
    message = stopped(joint_cfg(tmp_path, model))
    assert re.search(
        r'\(3, 8, 8\) are too small for the strides.*Resize in train_dataloader\.dataset\.pipeline', message
    )


def test_images_of_other_channels_are_named(tmp_path):
    grey = joint_cfg(tmp_path, train_dataloader=loader(dict(type='OddImages', odd='grey')))
    message = stopped(grey)
    assert 'backbone.router.in_channels=3, but images have 1 channels; set backbone.router.in_channels=1' in message
    grey.model.backbone.router.in_channels = 1
    message = stopped(grey)
    assert re.search(r'\(1, 8, 8\) have 1 channel\(s\) and the network reads 3: set in_channels=1 in the back', message)
    grey.model.backbone.backbone.in_channels = 1
    grey.train_cfg.max_epochs = 1
    build_runner(grey).train()


def test_layers_that_are_given_windows_are_named_before_training(tmp_path):
    """Whether windows are whole images depends on the size of the images, which a backbone is not told."""
    swin = dict(
        type='SwinTransformer',
        arch=dict(embed_dims=8, depths=[1] * 2, num_heads=[1] * 2),
        patch_size=1,
        window_size=4,
        out_indices=(1,),
    )
    model = model_cfg(head=dict(type='LinearClsHead', num_classes=CLASSES, in_channels=16))
    model['backbone'].update(include=['attn.*proj'], exclude=['nowhere'], backbone=swin)
    message = stopped(joint_cfg(tmp_path, model))
    assert "the expert layer 'stages.0.blocks.0.attn.w_msa.proj' is given 4 rows for 1 images" in message
    assert 'backbone.exclude' in message
    # In the second stage a window is an image.
    model['backbone']['exclude'] = [r'stages\.0']
    build_runner(joint_cfg(tmp_path, model, epochs=1)).train()


def test_iterations_are_checked_like_epochs(tmp_path):
    cfg = joint_cfg(
        tmp_path,
        train_cfg=dict(by_epoch=False, max_iters=4),
        train_dataloader=loader(dict(type='OddImages', odd='label')),
    )
    assert 'labels [3]' in stopped(cfg)


def full_cfg(**overrides):
    schedule = dict(type='MultiStepLR', milestones=[1])
    return Config(
        dict(
            model=model_cfg(data_preprocessor=PAIR),
            optim_wrapper=turns_cfg(),
            param_scheduler=dict(experts=schedule, router=schedule),
        )
        | overrides
    )


@pytest.mark.parametrize(
    ('overrides', 'message'),
    [
        (dict(param_scheduler=dict(experts=[])), r'param_scheduler\.router is missing'),
        (dict(param_scheduler=dict(experts=[], router=[], routers=[])), r"param_scheduler\.routers .* mean 'router'\?"),
        (dict(model=model_cfg(data_preprocessor=REPLACE)), r"mode='replace' takes the clean images away"),
        # The type of a RobustClassifier's preprocessor goes without saying.
        (dict(model=model_cfg(data_preprocessor=dict(mode='replace'))), r"mode='replace' takes the clean images away"),
        (dict(model=classifier(PAIR)), r'hands adv_inputs to ImageClassifier'),
        (dict(data_preprocessor=REPLACE), r'set in model and at the top level, which MMEngine does not read then'),
        (dict(model=dict(type='ImageClassifier'), data_preprocessor=PAIR), r'hands adv_inputs to ImageClassifier'),
        (
            dict(model=dict(type=ImageClassifier, data_preprocessor=dict(PAIR, type=AdvDataPreprocessor))),
            r'hands adv_inputs to ImageClassifier',
        ),
        (
            dict(
                model=dict(
                    type='mmpretrain.ImageClassifier',
                    data_preprocessor=dict(PAIR, type='mmpretrain.AdvDataPreprocessor'),
                )
            ),
            r'hands adv_inputs to ImageClassifier',
        ),
    ],
)
def test_a_config_is_checked_before_anything_is_built(overrides, message):
    with pytest.raises(ValueError, match=message):
        check_config(full_cfg(**overrides))


def test_sound_configs_pass():
    check_config(full_cfg())
    check_config(full_cfg(param_scheduler=[dict(type='MultiStepLR', milestones=[1])]))
    check_config(full_cfg(param_scheduler=None))
    check_config(full_cfg(model=dict(type=RobustClassifier, data_preprocessor=PAIR)))
    check_config(full_cfg(model=classifier(REPLACE)))
    check_config(full_cfg(model=classifier(None)))
    check_config(full_cfg(model=dict(type='NobodyKnows', data_preprocessor=PAIR)))
    check_config(Config())


@pytest.mark.parametrize('width', [0, 2.5])
def test_a_width_that_no_layer_can_have_is_named(width):
    model = model_cfg()
    model['backbone']['backbone']['base_channels'] = width
    with pytest.raises(ValueError, match=rf'model\.backbone\.backbone\.base_channels={width}.*nearest is'):
        check_config(dict(model=model))


@DATASETS.register_module()
class NamedImages(RandomImages):
    """Sixteen images of classes a, b and c, that can be told without them."""

    def __init__(self, classes='abc', labels=(0, 1, 2)):
        super().__init__()
        self.metainfo = dict(classes=tuple(classes))
        self.labels = labels

    def get_cat_ids(self, index):
        return [self.labels[index % len(self.labels)]]


def test_classes_in_another_order_are_refused(tmp_path):
    cfg = joint_cfg(
        tmp_path,
        train_dataloader=loader(dict(type='NamedImages')),
        **with_validation(type='NamedImages', classes='acb'),
    )
    message = stopped(cfg)
    assert re.search(r"label 1 is 'b' in train_dataloader and 'c' in val_dataloader.*metainfo=dict\(classes", message)


def test_classes_of_the_test_are_those_of_training(tmp_path):
    checkpoint = dict(default_hooks=dict(checkpoint=dict(type='SafeCheckpointHook', interval=1)))
    build_runner(joint_cfg(tmp_path, epochs=1, train_dataloader=loader(dict(type='NamedImages')), **checkpoint)).train()

    def test(classes):
        cfg = joint_cfg(tmp_path, load_from=str(tmp_path / 'epoch_1.pth'), test_cfg=dict())
        cfg.merge_from_dict(
            dict(
                test_dataloader=dict(loader(dict(type='NamedImages', classes=classes)), batch_size=8),
                test_evaluator=dict(type='Accuracy'),
            )
        )
        return build_runner(cfg).test()

    assert 'accuracy/top1' in test('abc')
    with pytest.raises(ValueError, match=r"label 0 is 'a' in training .* and 'b' in test_dataloader"):
        test('bac')


def warnings_of(dataset, num_classes):
    """What :func:`check_data` warns of."""
    with pytest.MonkeyPatch.context() as patch:
        heard = []
        patch.setattr('mmadvmoe.runtime.preflight.print_log', lambda text, **_: heard.append(text))
        check_data(dataset, 'val_dataloader', num_classes)
    return heard


def test_a_split_without_some_of_the_classes_is_warned_of():
    assert warnings_of(NamedImages(), 3) == []
    (warning,) = warnings_of(NamedImages(labels=(1,)), 3)
    assert re.search(r'val_dataloader\.dataset \(NamedImages\) has no image of 2 of 3 classes: a, c\.', warning)
    # What cannot tell its labels without its images is not asked.
    assert warnings_of(RandomImages(), 3) == []


def test_a_subset_of_some_classes_has_their_labels_alone():
    digits = build_dataset(TEN)
    few = [index for index in range(len(digits)) if digits.get_cat_ids(index)[0] < 4]
    assert warnings_of(Subset(Subset(digits, few), range(40)), 4) == []
    assert 'no image of 6 of 10' in warnings_of(Subset(digits, few), 10)[0]
    assert 'no image of 6 of 10' in warnings_of(ConcatDataset([Subset(digits, few)] * 2), 10)[0]
    with pytest.raises(ValueError, match=r'labels \[4, 5'):
        check_data(Subset(digits, range(40)), 'data', 4)


class Halved(Dataset):
    """A wrapper of somebody else that gives labels of its own."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        sample = self.dataset[index]
        return sample['inputs'] / 255, int(sample['data_samples'].gt_label) // 5


def test_a_wrapper_of_somebody_else_may_give_other_labels():
    assert warnings_of(Halved(build_dataset(TEN)), 2) == []


@pytest.mark.parametrize('at', ['loss', 'attack'])
def test_groups_by_names_must_be_of_the_classes_of_the_data(tmp_path, at):
    loss = dict(type='ClassGroupLoss', groups=[[0], [1, 2]])
    attack = dict(type='ClassGroupAttack', groups=[[0], [1, 2]], eps=0.1, alpha=0.1, steps=1)
    # Of a data set that numbers its classes otherwise.
    (loss if at == 'loss' else attack).update(groups=['c', 'ba'], classes=['c', 'b', 'a'])
    model = model_cfg(router_loss=loss, data_preprocessor=dict(PAIR, router_attack=attack))
    hooks = [dict(type='AlternatingOptimHook'), dict(type='PreflightHook')]
    message = stopped(run_cfg(tmp_path, model=model, optim_wrapper=turns_cfg(), custom_hooks=hooks))
    assert re.search(r'ClassGroup\w+: groups go by classes=c, b, a, and the data set of training has a, b, c:', message)


def test_topk_beyond_the_classes_is_named(tmp_path):
    cfg = joint_cfg(tmp_path, **with_validation(type='RandomImages'))
    cfg.val_evaluator = [dict(type='Accuracy', topk=(1, 5))]
    assert re.search(r'val_evaluator: Accuracy with topk=\(1, 5\) .* best 5 of 3 classes', stopped(cfg))


@pytest.mark.parametrize('how', ['load_from', 'pretrained'])
def test_a_dense_checkpoint_is_not_loaded_into_a_mixture_as_if_it_were_one(tmp_path, how):
    dense = classifier(REPLACE)
    dense['backbone'] = dense['backbone']['backbone']
    torch.save(dict(state_dict=MODELS.build(dense).state_dict()), tmp_path / 'dense.pth')
    file = str(tmp_path / 'dense.pth')
    model = dict(classifier(REPLACE), pretrained=file)
    cfg = dict(load_from=dict(load_from=file), pretrained=dict(model=model, hooks=[dict(type='BindVictimHook')]))[how]
    message = stopped(joint_cfg(tmp_path, **cfg))
    assert re.search(r"dense\.pth' has no expert layer of this mixture \(backbone\.network.*init_cfg=dict", message)


@pytest.mark.parametrize('how', ['pretrained', 'init_cfg', 'backbone'])
def test_a_dense_checkpoint_is_no_start_of_a_mixture_by_whatever_name(tmp_path, how):
    dense, file = model_cfg(), str(tmp_path / 'dense.pth')
    dense['backbone'] = dense['backbone']['backbone']
    dense = MODELS.build(dense)
    torch.save((dense.backbone if how == 'backbone' else dense).state_dict(), file)
    source = dict(type='Pretrained', checkpoint=file)
    cfg = model_cfg(**{} if how == 'backbone' else {how: file if how == 'pretrained' else source})
    if how == 'backbone':
        cfg['backbone'] = dict(cfg['backbone'], init_cfg=source)
    with pytest.raises(ValueError, match=r"dense\.pth' has no expert layer of this mixture"):
        MODELS.build(cfg).init_weights()


@pytest.mark.parametrize(
    ('model', 'message'),
    [
        (dict(router_loss=dict(type='TRADESLoss')), "model.router_loss is that of the router's turn, which joint"),
        (dict(data_preprocessor=dict(PAIR, router_attack=PAIR['attack'])), 'model.data_preprocessor.router_attack is'),
        (
            dict(route='held', data_preprocessor=dict(PAIR, attack=dict(PAIR['attack'], route='held'))),
            "model.route='held' cuts the gradient of the gate, and nothing in model.robust_loss trains the routers",
        ),
    ],
)
def test_what_joint_training_would_pass_over_is_refused(tmp_path, model, message):
    assert message in stopped(joint_cfg(tmp_path, model_cfg(**model)))


def test_routers_that_are_not_to_learn_may_be_held_in_joint_training(tmp_path):
    held = dict(route='held', data_preprocessor=dict(PAIR, attack=dict(PAIR['attack'], route='held')))
    runner = build_runner(joint_cfg(tmp_path, model_cfg(**held)))
    for module in router_modules(runner.model):
        module.requires_grad_(False)
    runner.train()


def test_a_router_that_would_learn_from_images_that_do_not_attack_it_is_refused(tmp_path):
    held = dict(type='PGD', eps=1.0, alpha=1.0, steps=1, route='held')
    model = dict(route='held', router_loss=dict(type='RouterKLLoss'), data_preprocessor=dict(PAIR, attack=held))
    hooks = [dict(type='AlternatingOptimHook'), dict(type='PreflightHook')]
    turns = dict(optim_wrapper=turns_cfg(), custom_hooks=hooks)
    message = stopped(run_cfg(tmp_path, model=model_cfg(**model), **turns))
    assert "would be that of the router's turn, too" in message and 'set data_preprocessor.router_attack' in message
    model['data_preprocessor']['router_attack'] = PAIR['attack']
    build_runner(run_cfg(tmp_path, model=model_cfg(**model), epochs=1, **turns)).train()


def test_single_images_are_refused_where_norms_are_of_the_batch_alone(tmp_path):
    model = model_cfg()
    model['backbone']['backbone']['norm_cfg'] = dict(type='GN', num_groups=1)
    model['backbone']['router']['norm_cfg'] = dict(type='GN', num_groups=1)
    build_runner(joint_cfg(tmp_path, model, epochs=1, train_dataloader=loader(dict(type='RandomImages'), 1))).train()


def test_what_routing_costs_is_logged_beside_the_pathway(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr('mmadvmoe.runtime.preflight.print_log', lambda text, **_: lines.append(text))
    runner = build_runner(joint_cfg(tmp_path, epochs=1))
    runner.train()
    (line,) = [line for line in lines if 'multiply-adds' in line]
    cost = count_cost(runner.model, (3, 8, 8))
    numbers = [float(number) for number in re.findall(r'(\d+\.\d+) million', line)]
    # Norms, which cost little, are not counted.
    assert numbers == pytest.approx([1000 * cost.router_gflops, 1000 * cost.pathway_gflops], rel=0.15)
