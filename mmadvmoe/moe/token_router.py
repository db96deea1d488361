"""The router of transformers: it scores the experts for each token."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from .routers import BaseRouter
from .token_routing import SOFTMAX, TokenRouting


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
        noise (float): Training adds normal noise of standard deviation ``noise / N`` to the logits (V-MoE uses 1).
            Defaults to 0.
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
        capacity_factor: Optional[float] = None,
        eval_capacity_factor: Optional[float] = None,
        init_std: float = 0.02,
        init_cfg: Optional[dict] = None,
    ) -> None:
        super().__init__(num_experts, init_cfg)
        if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= num_experts:
            raise ValueError(
                f'router.top_k={top_k!r} must be an integer in [1, {num_experts}], for there are '
                f'num_experts={num_experts}'
            )
        if softmax not in SOFTMAX:
            raise ValueError(f'router.softmax={softmax!r} is unknown; allowed: {SOFTMAX}')
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
        self, x: Tensor, given: Optional[Tensor] = None, training: bool = False, gated: bool = True
    ) -> TokenRouting:
        """Choose experts for tokens, or take the given ones.

        Args:
            x (Tensor): (B, T, C).
            given (Tensor, optional): (B, T * K): the experts of each token. Or (B,): an expert that every token of
                the image takes; with K > 1 beside the K - 1 others that the router likes best.
            training (bool): Whether the capacity is that of training. Noise is added while this module itself is
                in training mode.
            gated (bool): See :meth:`MoEBackbone.forward_routed`.

        Raises:
            ValueError: ``given`` has another shape, or names an expert that does not exist.
        """
        logits = self(x)
        if given is None:
            return TokenRouting.decide(
                logits,
                self.top_k,
                self.softmax,
                noise=torch.randn_like(logits) * self.noise_std if self.training and self.noise_std else None,
                noise_std=self.noise_std,
                capacity_factor=self.capacity_factor if training else self.eval_capacity_factor,
                per_image=not training,
                straight_through=gated,
            )
        expert = self._forced(logits, given) if given.dim() == 1 else self._held(logits, given)
        return TokenRouting.fixed(expert, logits, self.softmax, self.noise_std)

    def _forced(self, logits: Tensor, expert: Tensor) -> Tensor:
        if len(expert) != len(logits) or expert.amin() < 0 or expert.amax() >= self.num_experts:
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
