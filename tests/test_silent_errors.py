"""What would give plausible numbers that mean nothing is refused, wherever a model classifies."""

import cv2
import numpy as np
import pytest
import torch
from mmpretrain.models import ClsDataPreprocessor
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from small_mixtures import random_mixture
from torch.utils.data import Dataset

from mmadvmoe.apis import evaluate_robustness, inference
from mmadvmoe.attacks import NormalizedClassifier, build_attack
from mmadvmoe.datasets import ChunkSampler
from mmadvmoe.diagnosis.dissection import dissect
from mmadvmoe.diagnosis.subject import Images, ThreatModel
from mmadvmoe.evaluation.data import as_dataset, read_chunks
from mmadvmoe.moe import NonFiniteRouterError, router_modules


class _One(Dataset):
    """A data set of one sample."""

    def __init__(self, sample):
        self.sample = sample

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.sample


SIZES = dict(eps=0.1, alpha=0.05, steps=1)
PATHS = {
    'model': lambda victim, images, labels: victim.model(images),
    'routes': lambda victim, images, labels: victim.decide_routes(images),
    'inference': lambda victim, images, labels: inference(victim, images),
    'evaluation': lambda victim, images, labels: evaluate_robustness(victim, (images, labels), ['pgd10'], eps=0.1),
    'PGD': lambda victim, images, labels: build_attack(dict(type='PGD', **SIZES), victim)(images, labels),
    'RoutePGD': lambda victim, images, labels: build_attack(dict(type='RoutePGD', **SIZES), victim)(images, labels),
    'dissection': lambda victim, images, labels: dissect(
        victim, Images(images, labels, 8), ThreatModel('Linf', **SIZES)
    ),
}


@pytest.mark.parametrize('path', PATHS)
def test_a_router_that_is_not_finite_is_named(path):
    for routing, name in (('image', 'router'), ('layer', r'layer\d.*conv\d'), ('token', r'layers\.1\.ffn')):
        victim = random_mixture(routing)
        images, labels = torch.rand(4, 3, 8, 8), torch.arange(4)
        router = router_modules(victim.model)[-1]
        with torch.no_grad():
            next(iter(router.parameters())).view(-1)[0] = float('nan')
        with pytest.raises(NonFiniteRouterError, match=f"the router '{name}' are not finite"):
            PATHS[path](victim, images, labels)


@pytest.mark.parametrize('call', ['model', 'inference'])
def test_images_are_brought_to_their_range_by_their_type_or_refused(call):
    victim = random_mixture('image')
    classify = victim.model if call == 'model' else lambda images: inference(victim, images)[0]
    pixels = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    expected = classify(pixels / 255)
    assert classify(pixels).equal(expected)
    torch.testing.assert_close(classify((pixels.int() * 257).to(torch.uint16)), expected)
    with pytest.raises(TypeError, match='int64, which does not tell what is white'):
        classify(pixels.long())
    for wrong in (pixels.float(), pixels / 127.5 - 1, (pixels / 255).index_fill(0, torch.tensor([3]), torch.nan)):
        with pytest.raises(ValueError, match=r'must be in \[0, 1\], got values from .*divide pixels in 0\.\.255'):
            classify(wrong)


def test_files_of_sixteen_bits_hold_the_same_images(tmp_path):
    (tmp_path / 'a').mkdir()
    images = torch.randint(0, 256, (4, 8, 8, 3)).numpy()
    for number, image in enumerate(images):
        cv2.imwrite(str(tmp_path / 'a' / f'{number}_8.png'), image.astype(np.uint8))
        cv2.imwrite(str(tmp_path / 'a' / f'{number}_16.png'), (image * 257).astype(np.uint16))
    load = dict(type='LoadImageFromFile', color_type='unchanged')
    victim = random_mixture('image')
    dataset = as_dataset(dict(type='CustomDataset', data_root=str(tmp_path), pipeline=[load, dict(type='PackInputs')]))
    for preprocessor in ('ClsDataPreprocessor', 'AdvDataPreprocessor'):
        victim.classifier.data_preprocessor = MODELS.build(dict(type=preprocessor, mean=[9.0] * 3, std=[99.0] * 3))
        (chunk,) = read_chunks(dataset, ChunkSampler(dataset, 8), victim)
        torch.testing.assert_close(chunk.images[::2], chunk.images[1::2], rtol=0, atol=1e-5)


def test_floating_point_images_out_of_range_are_no_pixels():
    victim = random_mixture('image')
    victim.classifier.data_preprocessor = ClsDataPreprocessor()
    for image in (torch.rand(3, 8, 8), torch.full((3, 8, 8), -20.0)):
        sample = dict(inputs=image, data_samples=DataSample().set_gt_label(0))
        with pytest.raises(ValueError, match=r'expects 0\.\.255'):
            evaluate_robustness(victim, _One(sample), ['fgsm'], eps=0.1)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_takes_images_in_any(dtype):
    for routing in ('image', 'layer', 'token'):
        model = random_mixture(routing).model
        model.classifier.data_preprocessor = MODELS.build(dict(type='AdvDataPreprocessor'))
        model = NormalizedClassifier(model.classifier).to(dtype)
        images = torch.rand(4, 3, 8, 8)
        for given in (images, images.to(dtype), images.double()):
            assert model(given).dtype == torch.float32
            adversarial = build_attack(dict(type='RoutePGD', **SIZES), model)(given, torch.arange(4))
            assert adversarial.dtype == given.dtype and not adversarial.equal(given)
