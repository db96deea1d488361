"""Other libraries attack a loaded model as they attack any module, and find what the attacks here find."""

import foolbox
import numpy as np
import pytest
import torch
from art.attacks.evasion import ProjectedGradientDescentPyTorch
from art.estimators.classification import PyTorchClassifier
from mmengine.registry import DefaultScope
from mmpretrain.registry import DATASETS
from original_autoattack import run_original
from torch import Tensor, nn

from mmadvmoe.apis import get_model
from mmadvmoe.attacks import build_attack

DENSE, MIXTURE = 'at_sdense_resnet18_digits', 'advmoe_resnet18_digits'
BALL = dict(eps=0.2, alpha=0.05, steps=10)


def _digits() -> tuple[Tensor, Tensor]:
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        dataset = DATASETS.build(dict(type='Digits', split='test', pipeline=[dict(type='PackInputs')]))
    samples = [dataset[i] for i in range(len(dataset))]
    images = torch.stack([sample['inputs'] for sample in samples]).float() / 255
    return images, torch.cat([sample['data_samples'].gt_label for sample in samples])


@pytest.fixture(scope='module', params=[DENSE, MIXTURE])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return get_model(request.param, pretrained=True)


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
    images, labels = _digits()
    found = {}
    for attack in (_with_torchattacks, _with_foolbox, _with_art):
        adversarial = attack(model, images, labels)
        assert (adversarial - images).abs().max() <= BALL['eps'] + 1e-6
        found[attack.__name__] = _accuracy(model, adversarial, labels)
    clean = _accuracy(model, images, labels)
    # The attack has to matter, and to leave something to agree on.
    assert clean > 80 and all(5 < accuracy < clean - 10 for accuracy in found.values())
    assert max(found.values()) - min(found.values()) <= 1.0


@pytest.mark.parametrize('model', [MIXTURE], indirect=True)
def test_autoattack_is_that_of_its_authors_bit_for_bit(model: nn.Module) -> None:
    images, labels = (each[:20] for each in _digits())
    short = dict(norm='Linf', eps=BALL['eps'], steps=5, n_queries=20)
    with model.frozen():
        expected = run_original(model, images, labels, seed=0, **short)
    found = build_attack(dict(type='AutoAttack', **short), model)(images, labels, seed=0)
    assert torch.equal(found, expected)
    assert 5 < _accuracy(model, found, labels) < _accuracy(model, images, labels) - 10


def test_a_loaded_model_is_a_plain_module(model: nn.Module) -> None:
    images, labels = _digits()
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
