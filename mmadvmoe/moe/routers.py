"""Routers: they read an input and score the experts. Their parameters are ψ."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from mmadvmoe.utils import choose

from .token_routing import SOFTMAX, TokenRouting

#: The two parameter groups: the experts θ and the router ψ.
GROUPS = ('experts', 'router')


class BaseRouter(BaseModule):
    """Base of everything that decides routes.

    A parameter belongs to the router group ψ exactly when it lies below a ``BaseRouter``.

    Args:
        num_experts (int): N >= 2, the number of logits.
        init_cfg (dict, optional): As in MMEngine.

    Attributes:
        reads_tokens (bool): Whether it gives logits for each token, (B, T, N), rather than for each image.
        reads_images (bool): Whether it reads the images themselves, and not what some layer is given.
    """

    reads_tokens = False
    reads_images = False

    def __init__(self, num_experts: int, init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        if num_experts < 2:
            raise ValueError(f'router.num_experts={num_experts}: a router chooses between at least 2 experts')
        self.num_experts = num_experts

    def affine_maps(self) -> tuple[Callable[[Tensor], Tensor], ...] | None:
        """Affine maps that with a ReLU between each two make up the router, as bounds on its logits need them.

        None for a router that is not made so.
        """
        return None


def check_channels(images: Tensor, in_channels: int) -> None:
    """Raise ValueError, naming the key, unless images (B, C, H, W) have the channels that a router reads."""
    if images.shape[1] != in_channels:
        raise ValueError(
            f'backbone.router.in_channels={in_channels}, but images have {images.shape[1]} channels; set '
            f'backbone.router.in_channels={images.shape[1]}'
        )


class _RouterBlock(nn.Module):
    """Basic residual block whose shortcut has no parameters: strided and padded with zero channels.

    x: (B, C_in, H, W) -> (B, C_out, H/stride, W/stride).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm_cfg: dict) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = build_norm_layer(norm_cfg, out_channels)[1]
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = build_norm_layer(norm_cfg, out_channels)[1]
        self.stride = stride
        self.extra_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        if self.stride > 1 or self.extra_channels:
            before = self.extra_channels // 2
            x = x[:, :, :: self.stride, :: self.stride]
            x = F.pad(x, (0, 0, 0, 0, before, self.extra_channels - before))
        return F.relu(out + x, inplace=True)


_INIT = [dict(type='Kaiming', layer='Conv2d'), dict(type='Normal', layer='Linear', std=0.01)]


@MODELS.register_module()
class ResNetRouter(BaseRouter):
    """The image-level router of AdvMoE: a small CIFAR ResNet on the input image.

    Three stages of three basic blocks with 16, 32 and 64 channels and parameter-free shortcuts (He et al.,
    arXiv:1512.03385, section 4.2, option A), global average pooling and a linear layer to the experts, as in
    arXiv:2308.10110.

    Args:
        num_experts (int): N >= 2.
        in_channels (int): Channels of the image. Defaults to 3.
        base_channels (int): Channels of the first stage; each later stage doubles them. Defaults to 16.
        num_blocks (int): Blocks of a stage. Defaults to 3.
        num_stages (int): Each but the first halves height and width. Defaults to 3.
        stem_stride (int): Stride of the first convolution; above 1 for large images. Defaults to 1.
        norm_cfg (dict, optional): Norm layers. Defaults to ``dict(type='BN')``.
        init_cfg (dict, optional): Defaults to He initialisation of the convolutions and a normal distribution of
            standard deviation 0.01 for the linear layer, so that no expert is ahead at the start.
    """

    reads_images = True

    def __init__(
        self,
        num_experts: int,
        in_channels: int = 3,
        base_channels: int = 16,
        num_blocks: int = 3,
        num_stages: int = 3,
        stem_stride: int = 1,
        norm_cfg: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(num_experts, init_cfg or _INIT)
        norm_cfg = norm_cfg or dict(type='BN')
        self.conv1 = nn.Conv2d(in_channels, base_channels, 3, stem_stride, 1, bias=False)
        self.bn1 = build_norm_layer(norm_cfg, base_channels)[1]
        blocks, channels = [], base_channels
        for stage in range(num_stages):
            out_channels = base_channels * 2**stage
            for block in range(num_blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(_RouterBlock(channels, out_channels, stride, norm_cfg))
                channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, num_experts)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) -> logits (B, N)."""
        check_channels(x, self.conv1.in_channels)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.blocks(x)
        return self.fc(x.mean(dim=(2, 3)))


@MODELS.register_module()
class LayerRouter(BaseRouter):
    """A light router for one expert layer: average over all positions, then one linear layer.

    Args:
        num_experts (int): N >= 2.
        in_channels (int): C, channels of the layer's input; given by :class:`MoEBackbone`.
        channels_last (bool): Whether the input is (B, ..., C) rather than (B, C, ...). Defaults to False.
        init_cfg (dict, optional): Defaults to a normal distribution of standard deviation 0.01.
    """

    def __init__(
        self, num_experts: int, in_channels: int, channels_last: bool = False, init_cfg: dict | None = None
    ) -> None:
        super().__init__(num_experts, init_cfg or dict(type='Normal', layer='Linear', std=0.01))
        self.channels_last = channels_last
        self.fc = nn.Linear(in_channels, num_experts)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, ...) or (B, ..., C) -> logits (B, N)."""
        if x.dim() > 2:
            x = x.flatten(1, -2).mean(dim=1) if self.channels_last else x.flatten(2).mean(dim=2)
        return self.fc(x)


@MODELS.register_module()
class TokenRouter(BaseRouter):
    """A linear gate that sends each token to its top K experts.

    It computes in float32 also under autocast, because a rounded logit sends a token elsewhere (arXiv:2101.03961,
    section 2.4). Sources: V-MoE, arXiv:2106.05974; Switch, arXiv:2101.03961.

    Args:
        num_experts (int): N >= 2.
        in_channels (int): C of a token; given by :class:`MoEBackbone`.
        top_k (int): Experts of each token, K in [1, N]. Defaults to 1.
        softmax (str): ``'before'`` or ``'after'`` the choice of the top K; see :meth:`TokenRouting.decide`. Only
            ``'after'`` makes an upcycled network compute what its dense source does. Defaults to ``'after'``.
        noise (float): Training adds normal noise of standard deviation ``noise / N`` to the logits (V-MoE uses 1), anew
            in each pass, so that clean and adversarial ones differ by it, too. Defaults to 0.
        capacity_factor (float, optional): In training an expert computes at most this many times its equal share of
            the choices of a batch; what is dropped passes by the residual connection alone. Defaults to None: no
            drops.
        eval_capacity_factor (float, optional): The same at test and in attacks, counted in each image for itself, so
            that no image changes the prediction of another. Defaults to None.
        init_std (float): Standard deviation of the initial weights. Defaults to 0.02, as in arXiv:2212.05055.
        init_cfg (dict, optional): As in MMEngine.

    Raises:
        ValueError: An argument is out of range.
    """

    reads_tokens = True

    def __init__(
        self,
        num_experts: int,
        in_channels: int,
        top_k: int = 1,
        softmax: str = 'after',
        noise: float = 0.0,
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        init_std: float = 0.02,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(num_experts, init_cfg)
        if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= num_experts:
            raise ValueError(
                f'router.top_k={top_k!r} must be an integer in [1, {num_experts}], for there are '
                f'num_experts={num_experts}'
            )
        choose(softmax, SOFTMAX, 'router.softmax')
        if not noise >= 0:
            raise ValueError(f'router.noise={noise!r} must be at least 0')
        for key, value in (('capacity_factor', capacity_factor), ('eval_capacity_factor', eval_capacity_factor)):
            if value is not None and not value > 0:
                raise ValueError(f'router.{key}={value!r} must be above 0, or None for no drops')
        self.top_k = top_k
        self.softmax = softmax
        self.noise_std = noise / num_experts
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.init_std = init_std
        self.weight = nn.Parameter(torch.empty(num_experts, in_channels))
        nn.init.normal_(self.weight, std=init_std)

    def init_weights(self) -> None:
        """Draw the weights afresh."""
        nn.init.normal_(self.weight, std=self.init_std)
        super().init_weights()

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, C) -> logits (B, T, N), at least in float32."""
        precise = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(precise), self.weight.to(precise))

    def route(
        self, x: Tensor, given: None | Tensor | TokenRouting = None, training: bool = False, gated: bool = True
    ) -> TokenRouting:
        """Choose experts for tokens, or take the given ones.

        Args:
            x (Tensor): (B, T, C).
            given (Tensor or TokenRouting, optional): (B, T * K): the experts of each token. Or (B,): an expert that
                every token of the image takes; with K > 1 beside the K - 1 others that the router likes best. Or the
                decision of an earlier pass.
            training (bool): Whether the capacity is that of training. Noise is added while this module itself is
                in training mode.
            gated (bool): See :meth:`MoEBackbone.forward_routed`.

        Raises:
            ValueError: ``given`` has another shape, or names an expert that does not exist.
        """
        logits = self(x)
        capacity_factor = self.capacity_factor if training else self.eval_capacity_factor
        if given is None:
            return TokenRouting.decide(
                logits,
                self.top_k,
                self.softmax,
                noise=torch.randn_like(logits) * self.noise_std if self.training and self.noise_std else None,
                noise_std=self.noise_std,
                capacity_factor=capacity_factor,
                per_image=not training,
                straight_through=gated,
            )
        if isinstance(given, TokenRouting):
            if capacity_factor is None and given.kept is None:
                return given.again(logits, self.softmax)
            expert = given.expert
        else:
            expert = self._forced(logits, given) if given.dim() == 1 else self._held(logits, given)
        return TokenRouting.fixed(expert, logits, self.softmax, self.noise_std, capacity_factor, per_image=not training)

    def _forced(self, logits: Tensor, expert: Tensor) -> Tensor:
        if len(expert) != len(logits) or ((expert < 0) | (expert >= self.num_experts)).any():
            raise ValueError(
                f'a route must name one expert in [0, {self.num_experts}) for each of {len(logits)} images, '
                f'got {expert.unique().tolist()} in shape {tuple(expert.shape)}'
            )
        first = expert[:, None, None].expand(*logits.shape[:2], 1)
        return logits.detach().scatter(-1, first, torch.inf).topk(self.top_k, dim=-1).indices

    def _held(self, logits: Tensor, given: Tensor) -> Tensor:
        batch, tokens, _ = logits.shape
        if given.shape != (batch, tokens * self.top_k):
            raise ValueError(
                f'route must have shape (B,), or one column for each choice of each token in each layer; this layer '
                f'has {tokens} tokens with top_k={self.top_k} in {batch} images and got {tuple(given.shape)}. A route '
                'that was taken at another image size does not fit'
            )
        return given.view(batch, tokens, self.top_k)


def router_modules(model: nn.Module) -> list[BaseRouter]:
    """The routers of a model, outermost only, in the order of its modules."""
    routers: list[BaseRouter] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, BaseRouter) and id(module) not in inside:
            routers.append(module)
            inside.update(id(child) for child in module.modules())
    return routers


def split_parameters(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Split the parameters into experts θ and router ψ, each parameter in exactly one group.

    Returns:
        dict[str, list[tuple[str, nn.Parameter]]]: ``'experts'`` and ``'router'``, with the full parameter names.
    """
    router_ids = {id(p) for router in router_modules(model) for p in router.parameters()}
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {'experts': [], 'router': []}
    for name, parameter in model.named_parameters():
        groups['router' if id(parameter) in router_ids else 'experts'].append((name, parameter))
    return groups
