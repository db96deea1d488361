"""Other libraries attack a loaded model as they attack any module, and find what the attacks here find."""

import foolbox
import numpy as np
import pytest
import torch
from art.attacks.evasion import ProjectedGradientDescentPyTorch
from art.estimators.classification import PyTorchClassifier
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmpretrain.registry import DATASETS, MODELS
from original_autoattack import run_original
from torch import Tensor, nn

from mmadvmoe.apis import load_robust_model
from mmadvmoe.attacks import Victim, build_attack

BALL = dict(eps=0.2, alpha=0.05, steps=10)


def _config(num_experts: int) -> Config:
    backbone = dict(type='ResNet_CIFAR', depth=18, stem_channels=8, base_channels=4)
    if num_experts > 1:
        backbone = dict(
            type='MoEBackbone',
            num_experts=num_experts,
            include=[r'layer\d\.\d\.conv\d'],
            router=dict(type='ResNetRouter', base_channels=4, num_blocks=1),
            backbone=backbone,
        )
    return Config(
        dict(
            default_scope='mmpretrain',
            model=dict(
                type='RobustClassifier',
                data_preprocessor=dict(type='AdvDataPreprocessor', mean=[100.0] * 3, std=[90.0] * 3),
                backbone=backbone,
                neck=dict(type='GlobalAveragePooling'),
                head=dict(type='LinearClsHead', num_classes=10, in_channels=32),
            ),
        )
    )


def _digits(split: str) -> tuple[Tensor, Tensor]:
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        dataset = DATASETS.build(dict(type='Digits', split=split, pipeline=[dict(type='PackInputs')]))
    samples = [dataset[i] for i in range(len(dataset))]
    images = torch.stack([sample['inputs'] for sample in samples]).float() / 255
    return images, torch.cat([sample['data_samples'].gt_label for sample in samples])


def _train(classifier: nn.Module) -> None:
    """A few epochs of FGSM training: enough that an attack leaves some images standing."""
    images, labels = _digits('train')
    victim = Victim(classifier)
    attack = build_attack(dict(type='FGSM', eps=0.15), victim)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=5e-3)
    for epoch in range(6):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        for rows in order.split(64):
            adversarial = attack(images[rows], labels[rows])
            classifier.train()
            loss = nn.functional.cross_entropy(victim(torch.cat([images[rows], adversarial])), labels[rows].repeat(2))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@pytest.fixture(scope='module', params=[1, 2], ids=['dense', 'mixture'])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    torch.manual_seed(0)
    folder, cfg = tmp_path_factory.mktemp('interop'), _config(request.param)
    cfg.dump(folder / 'config.py')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        classifier = MODELS.build(cfg.model)
    classifier.init_weights()
    _train(classifier)
    torch.save(dict(meta={}, state_dict=classifier.state_dict()), folder / 'epoch_1.pth')
    return load_robust_model(folder / 'config.py', folder / 'epoch_1.pth')


def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return 100 * (model(images).argmax(1) == labels).float().mean().item()


def _with_torchattacks(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return build_attack(dict(type='PGD', random_start=False, **BALL), model)(images, labels)


def _with_foolbox(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    attack = foolbox.attacks.LinfPGD(abs_stepsize=BALL['alpha'], steps=BALL['steps'], random_start=False)
    return attack(foolbox.PyTorchModel(model, bounds=(0, 1)), images, labels, epsilons=BALL['eps'])[1]


def _with_art(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    classifier = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), tuple(images.shape[1:]), 10, clip_values=(0.0, 1.0), device_type='cpu'
    )
    attack = ProjectedGradientDescentPyTorch(
        classifier,
        norm=np.inf,
        eps=BALL['eps'],
        eps_step=BALL['alpha'],
        max_iter=BALL['steps'],
        num_random_init=0,
        batch_size=len(images),
        verbose=False,
    )
    return torch.from_numpy(attack.generate(images.numpy(), labels.numpy()))


def test_three_libraries_agree_on_robust_accuracy(model: nn.Module) -> None:
    images, labels = _digits('test')
    found = {}
    for attack in (_with_torchattacks, _with_foolbox, _with_art):
        adversarial = attack(model, images, labels)
        assert (adversarial - images).abs().max() <= BALL['eps'] + 1e-6
        found[attack.__name__] = _accuracy(model, adversarial, labels)
    clean = _accuracy(model, images, labels)
    # The attack has to matter, and to leave something to agree on.
    assert clean > 80 and all(5 < accuracy < clean - 10 for accuracy in found.values())
    assert max(found.values()) - min(found.values()) <= 1.0


def test_autoattack_is_that_of_its_authors_bit_for_bit(model: nn.Module) -> None:
    images, labels = (each[:30] for each in _digits('test'))
    short = dict(norm='Linf', eps=0.15, steps=10, n_queries=50)
    with model.frozen():
        expected = run_original(model, images, labels, seed=0, **short)
    found = build_attack(dict(type='AutoAttack', **short), model)(images, labels, seed=0)
    assert torch.equal(found, expected)
    assert 5 < _accuracy(model, found, labels) < _accuracy(model, images, labels) - 10


def test_a_loaded_model_is_a_plain_module(model: nn.Module) -> None:
    images, labels = _digits('test')
    assert isinstance(model, nn.Module) and not model.training
    assert model(images[:1]).shape == (1, 10)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    images = images[:4].clone().requires_grad_()
    nn.functional.cross_entropy(model(images), labels[:4]).backward()
    assert images.grad.flatten(1).abs().sum(1).gt(0).all()
    for attack in (_with_foolbox, _with_art):
        for count in (1, 4):
            assert attack(model, images.detach()[:count], labels[:count]).shape == (count, 3, 8, 8)
    assert not model.training and [parameter.requires_grad for parameter in model.parameters()] == flags
