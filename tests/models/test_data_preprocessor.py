import copy
import re
from types import SimpleNamespace

import pytest
import torch
from mmpretrain.engine.hooks import ClassNumCheckHook
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from tiny_models import CLASSES, make_classifier, make_data

from mmadvmoe.attacks import Victim
from mmadvmoe.models import AdvDataPreprocessor, NonFiniteError

IMAGENET = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
TRADES = dict(type='TRADESAttack', eps=0.1, alpha=0.05, steps=2)
PGD = dict(type='PGD', eps=0.1, alpha=0.05, steps=2)


def unit(data):
    return torch.stack(data['inputs']) / 255


@pytest.mark.parametrize('normalisation', [{}, IMAGENET], ids=['unit', 'imagenet'])
@pytest.mark.parametrize('attack', [TRADES, PGD], ids=['trades', 'pgd'])
def test_pair_adds_adversarial_inputs_in_the_scale_of_the_network(normalisation, attack):
    model = make_classifier(attack=attack, **normalisation)
    data = make_data()
    batch = model.data_preprocessor(data, training=True)
    mean = torch.tensor(normalisation.get('mean', [0.0])).view(-1, 1, 1)
    std = torch.tensor(normalisation.get('std', [255.0])).view(-1, 1, 1)
    torch.testing.assert_close(batch['inputs'], (torch.stack(data['inputs']) - mean) / std)
    adversarial = (batch['adv_inputs'] * std + mean) / 255
    offset = adversarial - unit(data)
    assert offset.abs().max() <= 0.1 + 1e-5 and adversarial.min() > -1e-5 and adversarial.max() < 1 + 1e-5
    assert (offset.flatten(1).abs().amax(1) > 0.05).all()
    assert not batch['adv_inputs'].requires_grad
    # The attack finds a higher loss of the network that gets these inputs.
    labels = torch.arange(4) % CLASSES
    model.eval()
    clean, attacked = (
        torch.nn.functional.cross_entropy(model(batch[key]), labels).item() for key in ('inputs', 'adv_inputs')
    )
    assert attack is TRADES or attacked > clean


def test_replace_gives_adversarial_inputs_alone():
    model = make_classifier('ImageClassifier', attack=PGD, mode='replace', **IMAGENET)
    preprocessor, data = model.data_preprocessor, make_data()
    preprocessor.bind_victim(Victim(model))
    torch.manual_seed(0)
    batch = preprocessor(data, training=True)
    assert set(batch) == {'inputs', 'data_samples'}
    paired = make_classifier('ImageClassifier', attack=PGD, **IMAGENET)
    paired.load_state_dict(model.state_dict())
    paired.data_preprocessor.bind_victim(Victim(paired))
    torch.manual_seed(0)
    assert batch['inputs'].equal(paired.data_preprocessor(make_data(), training=True)['adv_inputs'])


def test_evaluation_is_clean_and_as_mmpretrain_does_it():
    ours = make_classifier(attack=PGD, **IMAGENET).data_preprocessor
    theirs = MODELS.build(dict(type='ClsDataPreprocessor', to_rgb=True, **IMAGENET))
    ours.to_rgb = True
    batch, expected = ours(make_data(1)), theirs(make_data(1))
    assert set(batch) == {'inputs', 'data_samples'}
    torch.testing.assert_close(batch['inputs'], expected['inputs'])


@pytest.mark.parametrize('normalisation', [{}, IMAGENET, dict(mean=[103.53], std=[1.0])])
def test_eight_bit_images_come_back_exactly(normalisation):
    preprocessor = AdvDataPreprocessor(**normalisation)
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    inputs = preprocessor(dict(inputs=list(pixels)))['inputs']
    assert preprocessor.to_unit(inputs).equal(pixels / 255)
    between = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(preprocessor.to_unit(preprocessor.normalize(between)), between, atol=1e-4, rtol=0)


def test_weights_are_attacked_in_eval_mode_and_nothing_of_the_model_changes():
    model = make_classifier(attack=PGD)
    seen = []
    model.backbone.register_forward_pre_hook(lambda module, args: seen.append(module.training))
    model.train()
    model.head.eval()
    flags = [(m.training) for m in model.modules()]
    model.head.fc.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    model.data_preprocessor(make_data(), training=True)
    assert seen and not any(seen)
    assert [(m.training) for m in model.modules()] == flags
    assert [p for p in model.parameters() if not p.requires_grad] == [model.head.fc.weight]
    assert all(p.grad is None for p in model.parameters())
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())


def test_the_victim_is_no_part_of_the_model():
    model = make_classifier(attack=PGD)
    plain = make_classifier('ImageClassifier')
    assert list(model.state_dict()) == list(plain.state_dict())
    assert len(list(model.modules())) == len({id(m) for m in model.modules()})
    assert not any(isinstance(module, Victim) for module in model.modules())


def test_a_copy_attacks_its_own_weights():
    model = make_classifier(attack=dict(type='FGSM', eps=0.1))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.head.fc.weight.neg_()
    sign = [m.data_preprocessor(make_data(), True)['adv_inputs'] - unit(make_data()) for m in (model, twin)]
    assert not sign[0].equal(sign[1])
    # As if the copy had been made with these weights from the start.
    fresh = make_classifier(attack=dict(type='FGSM', eps=0.1))
    fresh.load_state_dict(twin.state_dict())
    assert (fresh.data_preprocessor(make_data(), True)['adv_inputs'] - unit(make_data())).equal(sign[1])


AUGMENTS = [dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0), dict(type='ResizeMix', alpha=1.0)]


@pytest.mark.parametrize('attack', [TRADES, PGD], ids=['trades', 'pgd'])
@pytest.mark.parametrize('augment', AUGMENTS, ids=lambda cfg: cfg['type'])
def test_batch_augmentations_come_before_the_attack(augment, attack):
    model = make_classifier(attack=attack, num_classes=CLASSES, train_cfg=dict(augments=augment))
    data = make_data(8)
    batch = model.data_preprocessor(data, training=True)
    assert (batch['adv_inputs'] - batch['inputs']).abs().max() <= 0.1 + 1e-5
    assert not batch['inputs'].equal(unit(data)), 'nothing was mixed'
    scores = torch.stack([sample.gt_score for sample in batch['data_samples']])
    torch.testing.assert_close(scores.sum(1), torch.ones(8))
    losses = model.loss(**batch)
    assert all(value.isfinite() for value in losses.values())
    # The head's loss is the cross entropy with the mixed labels.
    expected = -(scores * model(batch['inputs']).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(losses['loss_natural'], expected, rtol=1e-4, atol=1e-5)


def test_an_attack_that_needs_hard_labels_is_refused_by_name():
    model = make_classifier(
        attack=dict(type='APGD', eps=0.1, steps=2), num_classes=CLASSES, train_cfg=dict(augments=AUGMENTS[0])
    )
    with pytest.raises(ValueError, match="'APGD' takes class indices, got soft labels"):
        model.data_preprocessor(make_data(), training=True)


def test_without_a_victim_the_attack_says_what_to_do():
    preprocessor = AdvDataPreprocessor(attack=PGD)
    assert not preprocessor.has_victim
    with pytest.raises(RuntimeError, match=r'no victim.*RobustClassifier.*BindVictimHook'):
        preprocessor(make_data(), training=True)
    assert 'adv_inputs' not in preprocessor(make_data())


def of_sizes(*sizes):
    return dict(
        inputs=[torch.zeros(3, s, s, dtype=torch.uint8) for s in sizes], data_samples=make_data()['data_samples']
    )


@pytest.mark.parametrize(
    ('data', 'message'),
    [
        (of_sizes(8, 8, 9, 8), r'differ in size.*\(3, 8, 8\), \(3, 9, 9\).*train_dataloader\.dataset\.pipeline'),
        (make_data(1), r'single image.*train_dataloader\.batch_size'),
        (dict(make_data(), inputs=[torch.full((3, 8, 8), 0.5)] * 4), r'lie in \[0\.5, 0\.5\].*0\.\.255.*pipeline'),
        (dict(make_data(), inputs=-torch.ones(4, 3, 8, 8)), r'lie in \[-1, -1\].*0\.\.255'),
        (dict(make_data(), inputs=torch.full((4, 3, 8, 8), torch.nan)), r'lie in \[nan, nan\]'),
    ],
    ids=['two-sizes', 'one-image', 'unit', 'normalised', 'nan'],
)
def test_wrong_images_are_named(data, message):
    model = make_classifier(attack=PGD)
    with pytest.raises(ValueError, match=message):
        model.data_preprocessor(data, training=True)


def test_one_channel_is_not_made_three_by_the_scale():
    preprocessor = AdvDataPreprocessor(mean=[9.0] * 3, std=[9.0] * 3)
    with pytest.raises(ValueError, match=r'mean and std have 3 numbers and images have 1 channel\(s\)'):
        preprocessor(dict(make_data(), inputs=torch.full((4, 1, 8, 8), 9.0)))


def test_float_pixels_and_a_lone_image_in_evaluation_are_fine():
    preprocessor = make_classifier(attack=PGD).data_preprocessor
    assert len(preprocessor(make_data(1))['inputs']) == 1
    floats = dict(make_data(), inputs=[image.float() for image in make_data()['inputs']])
    assert preprocessor(floats)['inputs'].equal(unit(make_data()))
    black = dict(make_data(), inputs=torch.zeros(4, 3, 8, 8))
    assert not preprocessor(black)['inputs'].any()


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(mode='pairs'), "mode='pairs' is unknown (did you mean 'pair'?); allowed: pair, replace"),
        (dict(mean=[0.485], std=[0.229]), 'in the scale 0..1, but images come in 0..255: multiply both by 255'),
        (dict(mean=[0.485], std=[58.0]), 'mean=[0.485], std=[58.0] are in the scale 0..1'),
        (dict(mean=[123.7], std=[0.229]), 'in the scale 0..1'),
        (dict(mean=[0, 0, 0], std=[1, 1, 1]), 'in the scale 0..1'),
        (dict(mean=[300.0], std=[58.0]), 'mean in [0, 255], std in (0, 255]'),
        (dict(mean=[120.0], std=[0.0]), 'mean in [0, 255], std in (0, 255]'),
        (dict(mean=[120.0, 120.0], std=[58.0]), 'differ in length'),
        (dict(mean=[120.0]), 'must be given together'),
    ],
)
def test_wrong_settings_are_named(kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        AdvDataPreprocessor(**kwargs)


@pytest.mark.parametrize(
    'kwargs', [dict(mean=[0, 0, 0], std=[255, 255, 255]), dict(mean=(104, 117, 123), std=(1, 1, 1))]
)
def test_usual_settings_pass(kwargs):
    AdvDataPreprocessor(**kwargs)


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('head.fc.weight', r'not finite( at iteration \d+)?: class logits'),
        ('backbone.router.fc.weight', r'not finite( at iteration \d+)?: router logits'),
    ],
)
def test_weights_that_are_not_finite_are_named_by_what_they_spoil(name, message):
    model = make_classifier(attack=TRADES, moe=True)
    with torch.no_grad():
        model.get_parameter(name).fill_(float('inf'))
    with pytest.raises(NonFiniteError, match=message):
        model.data_preprocessor(make_data(), training=True)


def test_data_samples_with_scores_are_attacked_by_their_scores():
    model = make_classifier(attack=PGD)
    data = make_data()
    data['data_samples'] = [DataSample().set_gt_score(torch.eye(CLASSES)[i % CLASSES]) for i in range(4)]
    torch.manual_seed(0)
    soft = model.data_preprocessor(data, training=True)['adv_inputs']
    torch.manual_seed(0)
    assert soft.equal(model.data_preprocessor(make_data(), training=True)['adv_inputs'])


def test_the_classes_are_those_of_the_model_for_hooks_and_augmentations():
    model = make_classifier(attack=PGD, train_cfg=dict(augments=dict(type='Mixup', alpha=1.0)))
    dataset = SimpleNamespace(CLASSES=tuple('abc'))
    ClassNumCheckHook()._check_head(SimpleNamespace(model=model), dataset)
    batch = model.data_preprocessor(make_data(), training=True)
    assert batch['data_samples'][0].gt_score.shape == (CLASSES,)
