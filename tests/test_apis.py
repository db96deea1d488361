import copy
import pickle
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from PIL import Image
from tiny_models import dense_backbone
from torch import Tensor, nn

from mmadvmoe.apis import inference, load_robust_model
from mmadvmoe.attacks import NormalizedClassifier, build_attack
from mmadvmoe.runtime.safe_load import CheckpointError

MEAN, STD = [120.0, 110.0, 100.0], [60.0, 50.0, 40.0]


def _config(num_experts: int = 2) -> Config:
    return Config(
        dict(
            default_scope='mmpretrain',
            data_preprocessor=dict(type='AdvDataPreprocessor', mean=MEAN, std=STD),
            model=dict(
                type='RobustClassifier',
                backbone=dict(
                    type='MoEBackbone',
                    num_experts=num_experts,
                    include=[r'layer1.*conv\d'],
                    router=dict(type='ResNetRouter', base_channels=4, num_blocks=1),
                    backbone=dense_backbone(4),
                ),
                neck=dict(type='GlobalAveragePooling'),
                head=dict(type='LinearClsHead', num_classes=10, in_channels=8),
            ),
        )
    )


@pytest.fixture(scope='module')
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, nn.Module]:
    """Config file, checkpoint, and the classifier that the checkpoint was saved from."""
    from mmpretrain.registry import MODELS

    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp('trained')
    cfg = _config()
    cfg.dump(directory / 'config.py')
    cfg.model.data_preprocessor = cfg.data_preprocessor
    classifier = MODELS.build(cfg.model)
    classifier.init_weights()
    # As a trained model has them: statistics other than 0 and 1, logits that differ.
    classifier.train()(torch.randn(64, 3, 8, 8))
    nn.init.normal_(classifier.head.fc.weight)
    # As some distributed wrappers name them.
    weights = {f'module.{name}': value for name, value in classifier.state_dict().items()}
    torch.save(dict(meta={}, state_dict=weights), directory / 'epoch_1.pth')
    return directory / 'config.py', directory / 'epoch_1.pth', classifier.eval()


@pytest.fixture(scope='module')
def images() -> Tensor:
    return torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_the_loaded_model_is_the_trained_one_on_unit_images(trained: tuple, images: Tensor) -> None:
    config, checkpoint, classifier = trained
    model = load_robust_model(config, checkpoint)
    pixels = (images * 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        expected = classifier(pixels)
    assert not model.training and not any(module.training for module in model.modules())
    torch.testing.assert_close(model(images), expected)
    assert expected.argmax(1).unique().numel() > 1
    assert isinstance(model, nn.Module)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == sum(parameter.numel() for parameter in classifier.parameters()) > 0
    torch.testing.assert_close(load_robust_model(Config.fromfile(config), str(checkpoint))(images), expected)


def test_it_can_be_attacked_and_moved(trained: tuple, images: Tensor) -> None:
    model = load_robust_model(*trained[:2])
    labels = model(images).argmax(1)
    attack = build_attack(dict(type='RoutePGD', eps=0.3, alpha=0.1, steps=5), model)
    adversarial = attack(images, labels, seed=0)
    assert (model(adversarial).argmax(1) != labels).any()
    assert (adversarial - images).abs().max() <= 0.3 + 1e-6
    assert model.to(torch.float64)(images.double()).dtype == torch.float64
    assert all(p.dtype == torch.float64 for p in model.parameters())


def test_it_is_an_ordinary_module(trained: tuple, images: Tensor) -> None:
    config, checkpoint, classifier = trained
    model, other = (load_robust_model(config, checkpoint) for _ in range(2))
    expected = model(images)
    assert isinstance(model, NormalizedClassifier) and 'MoEBackbone' in repr(model)
    assert len(list(model.modules())) == len(list(classifier.modules())) + 1
    assert set(model.state_dict()) == {f'classifier.{key}' for key in classifier.state_dict()}
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    assert not torch.allclose(other(images), expected)
    assert not any(other.load_state_dict(model.state_dict()))
    for same in (other, nn.Sequential(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(same(images), expected)


def test_inference_gives_probabilities_and_routes_in_order(trained: tuple, images: Tensor) -> None:
    model = load_robust_model(*trained[:2])
    probabilities, experts = inference(model, images, batch_size=5)
    torch.testing.assert_close(probabilities, model(images).softmax(1).detach())
    assert experts.shape == (12, 1)
    assert torch.equal(experts[:, 0], model.forward_routed(images)[1][0].expert)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert [tuple(each.shape) for each in inference(model, images[:0])] == [(0, 10), (0, 1)]


def test_inference_takes_arrays_and_single_images(trained: tuple, images: Tensor) -> None:
    model = load_robust_model(*trained[:2])
    pixels = (images * 255).to(torch.uint8)
    expected, _ = inference(model, pixels)
    for array in (
        pixels.numpy(),
        pixels.permute(0, 2, 3, 1).numpy(),
        pixels.permute(0, 2, 3, 1).flip(2).numpy()[:, :, ::-1],
    ):
        assert torch.equal(inference(model, array)[0], expected)
    for one in (pixels[3], pixels[3].numpy(), pixels[3].permute(1, 2, 0).numpy()):
        probabilities, experts = inference(model, one)
        assert experts.shape == (1, 1)
        torch.testing.assert_close(probabilities, expected[3:4])
    with pytest.raises(ValueError, match=r'\(B, C, H, W\) or one \(C, H, W\), got \(8, 8\)'):
        inference(model, images[0, 0])
    with pytest.raises(TypeError, match=r'got a Image; of a PIL image numpy\.asarray makes one'):
        inference(model, Image.new('RGB', (8, 8)))


def test_a_checkpoint_of_another_model_is_refused(trained: tuple, tmp_path: Path) -> None:
    config, checkpoint, classifier = trained
    with pytest.raises(CheckpointError, match='does not fit the model'):
        load_robust_model(_config(num_experts=3), checkpoint)
    weights = classifier.state_dict()
    weights.pop('head.fc.weight')
    torch.save(dict(meta={}, state_dict=weights), tmp_path / 'missing.pth')
    with pytest.raises(CheckpointError, match=r'missing head\.fc\.weight'):
        load_robust_model(config, tmp_path / 'missing.pth')
    with pytest.raises(FileNotFoundError):
        load_robust_model(config, tmp_path / 'nothing.pth')
    with pytest.raises(TypeError, match='path of a config file or a Config, got a int'):
        load_robust_model(3, checkpoint)
