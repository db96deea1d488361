"""AutoAttack as its authors call it, with shorter runs."""

import pyautoattack
from torch import Tensor, nn


def run_original(
    model: nn.Module, images: Tensor, labels: Tensor, norm: str, eps: float, seed: int, steps: int, n_queries: int
) -> Tensor:
    """Adversarial images (B, C, H, W) of the version ``'standard'``."""
    attack = pyautoattack.AutoAttack(model, norm=norm, eps=eps, seed=seed, version='standard')
    for part in (attack.apgd, attack.apgd_targeted, attack.fab):
        part.n_iter = part.n_iter_orig = steps
        # As the constructor of APGD derives them from the number of iterations.
        part.n_iter_2, part.n_iter_min, part.size_decr = (max(int(p * steps), 1) for p in (0.22, 0.06, 0.03))
    attack.square.n_queries = n_queries
    return attack.run_standard_evaluation(images.clone(), labels.clone(), batch_size=len(images))[0]
