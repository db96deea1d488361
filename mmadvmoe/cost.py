"""Cost of a network: parameters, and multiply-adds of the pathway that an image really takes."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.analysis import FlopAnalyzer
from mmengine.registry import DefaultScope
from mmpretrain.datasets import build_dataset
from mmpretrain.registry import DATASETS, MODELS
from torch import Tensor, nn

from mmadvmoe.moe import ExpertLayer, forward_routed, router_modules
from mmadvmoe.utils import type_name

#: What torch says of a convolution or a pooling that would give an image of no size.
_NOTHING_LEFT = ("can't be greater than actual input size", 'Output size is too small')
_CHANNELS = re.compile(r'to have (\d+) channels, but got (\d+) channels')
_GIGA = 1e9


@dataclass(frozen=True)
class Cost:
    """Cost of one image at inference.

    One multiply-add counts as one FLOP, as MMEngine's ``FlopAnalyzer`` counts.

    Attributes:
        params_total (int): All parameters, those of every expert and of the routers included.
        params_active (int): Parameters that one image (or token) meets: one expert of each layer (the top K of token
            routers), what all share, the routers.
        params_router (int): Parameters of the routers.
        pathway_gflops (float): 1e9 multiply-adds per image of the pathway that is run, without the routers.
        router_gflops (float): 1e9 multiply-adds per image of the routers.
    """

    params_total: int
    params_active: int
    params_router: int
    pathway_gflops: float
    router_gflops: float

    @property
    def gflops(self) -> float:
        """1e9 multiply-adds per image of all that is run: pathway and routers."""
        return self.pathway_gflops + self.router_gflops

    def saving(self, dense: Cost) -> float:
        """How much less the pathway costs than the network ``dense``, in percent."""
        return 100.0 * (1.0 - self.pathway_gflops / dense.gflops)

    def saving_with_router(self, dense: Cost) -> float:
        """How much less pathway and routers together cost than the network ``dense``, in percent."""
        return 100.0 * (1.0 - self.gflops / dense.gflops)


def count_cost(model: Mapping | nn.Module, input_shape: Sequence[int] | None = None) -> Cost:
    """Count the cost of a classifier by running it once, on one image.

    A mixture runs one pathway for one image, so what is counted is what is run. A network that computes more than it
    needs while it is trained, and so has a ``deployed()`` form, is counted in that form.

    Args:
        model (Mapping or nn.Module): A whole config with ``model``, or a classifier, not wrapped for distributed
            training. It is left as it was.
        input_shape (Sequence[int], optional): (C, H, W). Defaults to None: what the config's pipelines give, see
            :func:`input_shape_of`; a classifier needs it.

    Raises:
        ValueError: There is no input shape, or the image does not fit the network.
    """
    if isinstance(model, nn.Module):
        if input_shape is None:
            raise ValueError('input_shape is missing: a model does not know the size of its images; give (C, H, W)')
        model = copy.deepcopy(model)
    else:
        input_shape = input_shape or input_shape_of(model)
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            model = MODELS.build(copy.deepcopy(model['model']))
    if hasattr(model, 'deployed'):
        model = model.deployed()
    model.eval()
    routers = router_modules(model)
    names = [name for name, module in model.named_modules() if any(module is router for router in routers)]
    analyzer = flop_analyzer(model, input_shape)
    router_flops = sum(analyzer.total(f'classifier.{name}') for name in names)
    total = _count(model.parameters())
    idle = sum(
        _count(layer.parameters(recurse=False)) * (layer.num_experts - getattr(layer, 'top_k', 1)) // layer.num_experts
        for layer in model.modules()
        if isinstance(layer, ExpertLayer)
    )
    return Cost(
        params_total=total,
        params_active=total - idle,
        params_router=sum(_count(router.parameters()) for router in routers),
        pathway_gflops=(analyzer.total() - router_flops) / _GIGA,
        router_gflops=router_flops / _GIGA,
    )


class _Traced(nn.Module):
    """Gives the routers' logits beside those of the classes.

    With one image there is nothing to sort, so that class logits do not depend on the routers, and a trace of them
    alone would leave the routers out.
    """

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        logits, routings = forward_routed(self.classifier, image)
        return (logits, *(routing.logits for routing in routings))


def flop_analyzer(classifier: nn.Module, input_shape: Sequence[int]) -> FlopAnalyzer:
    """MMEngine's counter for one image (C, H, W), silent about operations that cost nothing.

    The modules of the classifier, which is in eval mode, are found under the prefix ``classifier.``.

    Raises:
        ValueError: The image does not fit the network.
    """
    parameter = next(classifier.parameters())
    image = torch.zeros((1, *input_shape), device=parameter.device, dtype=parameter.dtype)
    traced = _Traced(classifier).eval()
    analyzer = FlopAnalyzer(traced, (image,)).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analyzer.tracer_warnings('none')
    with torch.no_grad(), image_must_fit(input_shape, 'give another input_shape'):
        analyzer.total()
    return analyzer


@contextmanager
def image_must_fit(shape: Sequence[int], advice: str) -> Iterator[None]:
    """Inside of this, an error of a network that an image of ``shape`` (C, H, W) does not fit says so, with an advice.

    Raises:
        ValueError: A convolution or pooling found nothing left to work on, or another number of channels.
    """
    try:
        yield
    except RuntimeError as error:
        if any(words in str(error) for words in _NOTHING_LEFT):
            raise ValueError(
                f'images of shape {tuple(shape)} are too small for the strides of the network: {advice}'
            ) from error
        channels = _CHANNELS.search(str(error))
        if channels and int(channels[2]) == shape[0]:
            raise ValueError(
                f'images of shape {tuple(shape)} have {shape[0]} channel(s) and the network reads {channels[1]}: set '
                f'in_channels={shape[0]} in the backbone that it is built from, or load images with {channels[1]}'
            ) from error
        raise


def input_shape_of(cfg: Mapping[str, Any], size: tuple[int, int] | None = None) -> tuple[int, int, int]:
    """(C, H, W) of the images that a config's training pipeline gives, or would give were their size (H, W).

    The size is that of the last transform that sets a square one, or else the ``image_shape`` of the data set's class,
    which also tells the channels; 3 where it does not, 1 behind a ``RandomGrayscale`` that always leaves one. Where
    nothing tells it, the data set is read and its first image asked.

    Raises:
        ValueError: Neither tells the size, and there is no data set that could.
    """
    whole = dataset = (cfg.get('train_dataloader') or cfg.get('test_dataloader') or {}).get('dataset') or {}
    while 'pipeline' not in dataset and 'dataset' in dataset:
        dataset = dataset['dataset']
    kind = dataset.get('type')
    kind = DATASETS.get(kind) if isinstance(kind, str) else kind
    shape = getattr(kind, 'image_shape', None)
    pipeline = dataset.get('pipeline') or []
    channels = shape[0] if shape else 3
    if any(
        type_name(step.get('type', '')) == 'RandomGrayscale' and step.get('prob') == 1 and not step.get('keep_channels')
        for step in pipeline
    ):
        channels = 1
    if size is not None:
        return (channels, *size)
    for transform in reversed(pipeline):
        size = transform.get('crop_size', transform.get('scale'))
        if size is None:
            continue
        sides = {size} if isinstance(size, int) else set(size)
        if len(sides) > 1:
            # Transforms disagree about whether the height or the width comes first.
            return _shape_of_first(whole)
        side = sides.pop()
        return (channels, side, side)
    return (channels, *shape[1:]) if shape else _shape_of_first(whole)


def _shape_of_first(dataset: Mapping[str, Any]) -> tuple[int, int, int]:
    while 'dataset' in dataset:  # what wraps a data set repeats, keeps or mixes its images
        dataset = dataset['dataset']
    try:
        return tuple(build_dataset(dataset)[0]['inputs'].shape)
    except Exception as error:  # anything that a data set of the user may do
        raise ValueError(
            'the input shape is unknown: no transform of train_dataloader.dataset.pipeline has a square crop_size or '
            f'scale, and its data set gives no image ({type(error).__name__}: {error}); give it by hand (get_flops.py: '
            '--shape)'
        ) from error


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
