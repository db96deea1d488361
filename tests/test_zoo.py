"""Models by name, and the weights that come with an installation."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from publish_model import MAX_BYTES, publish

from mmadvmoe import apis
from mmadvmoe.apis import evaluate_robustness, get_model, inference, list_models, load_robust_model
from mmadvmoe.datasets import Digits
from mmadvmoe.evaluation.data import as_dataset, spread_images
from mmadvmoe.runtime.safe_load import CheckpointError
from mmadvmoe.runtime.zoo import home, read_zoo

PRETRAINED = list_models(pretrained=True)
NAME = 'at_sdense_resnet18_digits'


def test_every_config_has_a_name() -> None:
    configs = [path.stem for path in (home() / 'configs').rglob('*.py') if '_base_' not in path.parts]
    assert list_models() == sorted(configs)
    assert list_models('advmoe_resnet18_cifar10*') == [
        name for name in sorted(configs) if 'advmoe_resnet18_cifar10' in name
    ]
    assert set(PRETRAINED) < set(configs)


@pytest.mark.parametrize('name', PRETRAINED)
def test_the_weights_are_those_of_the_metafile(name: str) -> None:
    model, entry = get_model(name, pretrained=True), read_zoo()[name]
    assert Path(entry.weights).stat().st_size <= MAX_BYTES
    config = Config.fromfile(entry.config)
    assert entry.metrics['worst'] <= entry.metrics['clean']
    assert {'Revision', 'Seed'} <= entry.metadata.keys()
    if config.test_dataloader.dataset.type != 'Digits':
        pytest.skip('the images do not come with an installation')
    images, labels = spread_images(
        as_dataset(config.test_dataloader.dataset), model.classifier.data_preprocessor, 10**6
    )
    accuracy = 100 * (inference(model, images)[0].argmax(1) == labels).double().mean().item()
    assert accuracy == pytest.approx(entry.metrics['clean'], abs=0.3)


def test_a_name_that_is_unknown_and_weights_that_are_not_there() -> None:
    with pytest.raises(
        ValueError, match=r"name='advmoe_resnet18_digit' is unknown \(did you mean 'advmoe_resnet18_digits'"
    ):
        get_model('advmoe_resnet18_digit')
    with pytest.raises(ValueError, match=r"no weights of 'advmoe_resnet18_imagenet' are published: train it"):
        get_model('advmoe_resnet18_imagenet', pretrained=True)


def test_a_model_with_random_weights_is_made_without_a_word(capfd: pytest.CaptureFixture) -> None:
    get_model(NAME)
    assert capfd.readouterr().out == ''


def test_published_weights_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_model(NAME)
    assert not model.training
    entry = read_zoo()[NAME]
    checkpoint, metrics = tmp_path / 'epoch_1.pth', tmp_path / 'metrics.json'
    torch.save(
        dict(meta=dict(epoch=1, seed=3), state_dict=model.classifier.state_dict(), optimizer=dict(state={})), checkpoint
    )
    metrics.write_text(json.dumps({'clean/accuracy/top1': 12.345, 'clean/expert_share/0': 1.0}))
    for wrong in ({}, {'clean/accuracy/top1': float('nan')}, {'val': 99.9}):
        (tmp_path / 'wrong.json').write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match='wrong.json holds no accuracies in percent'):
            publish(entry.config, checkpoint, tmp_path / 'wrong.json', 'abc', tmp_path / 'zoo')
    for _ in range(2):
        path = publish(entry.config, checkpoint, metrics, 'abc', tmp_path / 'zoo')
    assert [each.suffix for each in sorted((tmp_path / 'zoo').iterdir())] == ['.pth', '.json']
    noted = json.loads((tmp_path / 'zoo' / 'weights.json').read_text())[NAME]
    assert noted['metrics'] == dict(clean=12.35) or noted['metrics'] == dict(clean=12.34)
    assert noted['seed'] == 3
    assert noted['sha256'] == hashlib.sha256(path.read_bytes()).hexdigest()
    zoo = {NAME: replace(entry, weights=str(path), sha256=noted['sha256'])}
    monkeypatch.setattr(apis, 'read_zoo', lambda: zoo)
    images = torch.rand(3, 3, 8, 8)
    assert torch.equal(get_model(NAME, pretrained=True)(images), model(images))
    assert torch.equal(get_model(NAME, pretrained=checkpoint)(images), model(images))
    assert torch.equal(load_robust_model(entry.config, path)(images), model(images))
    # Another byte somewhere in the weights.
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match='is not the file that was published: its SHA-256 is'):
        get_model(NAME, pretrained=True)
    path.unlink()
    with pytest.raises(CheckpointError, match='are missing: install mmadvmoe again'):
        get_model(NAME, pretrained=True)


def test_inference_takes_arrays_and_single_images() -> None:
    model = get_model('advmoe_resnet18_digits')
    dataset = Digits(split='test', indices=4)
    arrays = [dataset.get_data_info(number)['img'] for number in range(4)]
    images = torch.stack([torch.from_numpy(array.transpose(2, 0, 1)) for array in arrays])
    expected, experts = inference(model, images / 255)
    for same in (images, images.numpy(), images.numpy().transpose(0, 2, 3, 1), (images / 255).double().numpy()):
        probabilities, routes = inference(model, same)
        torch.testing.assert_close(probabilities, expected)
        assert torch.equal(routes, experts)
    for one in (arrays[0], images[0], images[0] / 255):
        probabilities, routes = inference(model, one)
        assert probabilities.shape == (1, 10) and routes.shape == (1, 1)
        torch.testing.assert_close(probabilities, expected[:1])
    with pytest.raises(TypeError, match='a tensor or an array, got a list'):
        inference(model, arrays)
    with pytest.raises(ValueError, match=r'\(B, C, H, W\) or one \(C, H, W\), got \(8, 8\)'):
        inference(model, arrays[0][..., 0])


def test_any_module_is_evaluated_without_being_asked_for_its_classes() -> None:
    images, labels = torch.rand(6, 1, 4, 4), torch.tensor([0, 1, 2, 3, 1, 2])
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 4))
    attacks = dict(apgd=dict(type='APGDT', eps=0.1, steps=2))
    result = evaluate_robustness(model, (images, labels), attacks, device='cpu')
    assert result.outcomes.by_name['apgd'].logits.shape == (6, 4)
    given = evaluate_robustness(model, (images, labels), attacks, num_classes=4)
    assert given.metrics == result.metrics
