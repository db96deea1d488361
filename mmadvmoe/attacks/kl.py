"""Kullback-Leibler divergence between two sets of logits, as attacks and losses use it."""

from torch import Tensor


def kl_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(softmax(p) ‖ softmax(q)) of each image, in nats.

    Gradients flow to both arguments; detach the one that is to be held. Half-precision logits are
    taken to float32 first, so the result is the same under autocast.

    Args:
        p_logits (Tensor): (B, K); or (B, T, N) for routers that decide per token.
        q_logits (Tensor): The same shape.

    Returns:
        Tensor: (B,), averaged over tokens where there are any.

    Raises:
        ValueError: The shapes differ, or there is no batch dimension.
    """
    if p_logits.shape != q_logits.shape or p_logits.dim() < 2:
        raise ValueError(
            'kl_divergence needs two tensors of logits of one shape (B, ..., K), '
            f'got {tuple(p_logits.shape)} and {tuple(q_logits.shape)}'
        )
    p_log, q_log = (
        full_precision(p_logits).log_softmax(-1),
        full_precision(q_logits).log_softmax(-1),
    )
    divergence = (p_log.exp() * (p_log - q_log)).sum(-1)
    return divergence.flatten(1).mean(1) if divergence.dim() > 1 else divergence


def full_precision(logits: Tensor) -> Tensor:
    """Half-precision logits as float32; wider ones as they are."""
    return logits.float() if logits.element_size() < 4 else logits
