"""Outcomes of every image under every attack, and the metrics made of them.

Dimension letters: B images, K classes, D decisions of the routers for one image (0 for a dense model).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from mmengine.dist import all_gather_object, get_dist_info
from mmengine.evaluator import Evaluator
from mmpretrain.structures import DataSample
from torch import Tensor

#: The outcome without an attack, and the worst outcome of each image.
CLEAN, WORST = 'clean', 'worst'

#: The columns of :attr:`Outcome.distance`.
NORMS = ('linf', 'l2', 'l1')


@dataclass(frozen=True, eq=False)
class Outcome:
    """How B images came out, under one attack or none. All tensors are on the CPU.

    Attributes:
        logits: Class logits, (B, K) float32.
        expert: Expert that each router chose, (B, D) int64; of routers for tokens, the experts of all tokens in all
            layers.
        distance: Distance to the clean image in each of ``NORMS``, (B, 3) float32, for images in [0, 1].
        attacked: Whether the attack was run on the image, (B,) bool. Where it was not, because the image was wrong
            before, this is the outcome in which it went wrong first.
    """

    logits: Tensor
    expert: Tensor
    distance: Tensor
    attacked: Tensor

    @property
    def prediction(self) -> Tensor:
        """The predicted class of each image, (B,)."""
        return self.logits.argmax(dim=1)

    def where(self, mask: Tensor, other: Outcome) -> Outcome:
        """Take the images of ``mask`` (B,) from here, and all others from ``other``."""
        return self._combined(lambda a, b: torch.where(mask.view(-1, *[1] * (a.dim() - 1)), a, b), other)

    def take(self, rows: Tensor) -> Outcome:
        """Pick images by their row."""
        return self._combined(lambda a: a[rows])

    def put(self, rows: Tensor, other: Outcome) -> Outcome:
        """Replace the images in ``rows`` (b,) by those of ``other``, which has b images."""
        return self._combined(lambda a, b: a.index_copy(0, rows, b), other)

    @classmethod
    def cat(cls, outcomes: Sequence[Outcome]) -> Outcome:
        """Join the outcomes of disjoint sets of images."""
        first, *others = outcomes
        return first._combined(lambda *parts: torch.cat(parts), *others)

    def _combined(self, function: Callable[..., Tensor], *others: Outcome) -> Outcome:
        """Apply a function to each attribute of this outcome and the others."""
        names = [field.name for field in fields(self)]
        return Outcome(**{name: function(*(getattr(each, name) for each in (self, *others))) for name in names})


@dataclass(frozen=True, eq=False)
class RobustOutcomes:
    """The outcomes of B images under several attacks.

    Attributes:
        index: Index of each image in its data set, (B,) int64.
        label: True class, (B,) int64.
        by_name: The outcome without an attack under ``'clean'``, then that of each attack under its name, in the order
            of the config.
    """

    index: Tensor
    label: Tensor
    by_name: Mapping[str, Outcome]

    @property
    def robust(self) -> Tensor:
        """Images that are right without an attack and under every one, (B,) bool."""
        return self.worst().prediction == self.label

    def worst(self, attacks: Sequence[str] | None = None) -> Outcome:
        """Give each image the outcome of the first attack that fools the model, else the clean one.

        An image counts as robust in it exactly when it is classified rightly without an attack and under each of them.
        An image that is wrong without an attack keeps its clean outcome.

        Args:
            attacks: Names of the attacks that count. Defaults to all.
        """
        worst = self.by_name[CLEAN]
        for name in self.by_name if attacks is None else attacks:
            outcome = self.by_name[name]
            fooled = (worst.prediction == self.label) & (outcome.prediction != self.label)
            worst = outcome.where(fooled, worst)
        return worst

    @classmethod
    def merge(cls, parts: Sequence[RobustOutcomes]) -> RobustOutcomes:
        """Join the outcomes of disjoint sets of images, in data set order."""
        index = torch.cat([part.index for part in parts])
        order = index.argsort()
        by_name = {name: Outcome.cat([part.by_name[name] for part in parts]).take(order) for name in parts[0].by_name}
        return cls(index[order], torch.cat([part.label for part in parts])[order], by_name)


def gather_outcomes(parts: Sequence[RobustOutcomes], num_images: int) -> RobustOutcomes:
    """Collect what each process has, chunk by chunk, of a data set of so many images; every process gets all.

    Raises:
        RuntimeError: The processes together do not hold every image exactly once.
    """
    gathered = [part for of_rank in all_gather_object(list(parts)) for part in of_rank]
    if not gathered:
        raise RuntimeError('no image was evaluated: the data set is empty.')
    outcomes = RobustOutcomes.merge(gathered)
    if not torch.equal(outcomes.index, torch.arange(num_images)):
        raise RuntimeError(
            f'robust evaluation needs each of the {num_images} images of the data set exactly once, but the processes '
            f'hold {len(outcomes.index)} outcomes of {len(outcomes.index.unique())} different images.'
        )
    return outcomes


def compute_metrics(
    evaluator: Evaluator, outcomes: RobustOutcomes, worst_of: Mapping[str, Sequence[str]] | None = None
) -> dict:
    """Run an MMEngine evaluator once without an attack, once per attack and once on the worst case.

    The metrics see labels and predictions as MMPretrain's heads give them; they do not see images. To be called by all
    processes, with the same outcomes, those of the whole data set. ``worst_of`` names further worst cases, each over
    the attacks it names.

    Returns:
        Each metric under ``'clean/'``, ``'worst/'``, the names of attacks (``'pgd50/accuracy/top1'``) and of groups.
    """
    num_images = len(outcomes.index)
    rank, world_size = get_dist_info()
    # Metrics collect results by taking one from each process in turn, and drop what exceeds the size of the data set:
    # dealt out like this, every image comes back once and in order.
    rows = torch.arange(rank, rank + -(-num_images // world_size) * world_size, world_size)
    rows %= num_images
    groups = {name: outcomes.worst(attacks) for name, attacks in (worst_of or {}).items()}
    metrics = {}
    for name, outcome in {**outcomes.by_name, **groups, WORST: outcomes.worst()}.items():
        evaluator.process(data_samples=as_data_samples(outcome.take(rows), outcomes.index[rows], outcomes.label[rows]))
        metrics.update({f'{name}/{key}': value for key, value in evaluator.evaluate(num_images).items()})
    return metrics


def as_data_samples(outcome: Outcome, index: Tensor, label: Tensor) -> list[DataSample]:
    """Write an outcome as the data samples that MMPretrain's heads predict."""
    scores = outcome.logits.softmax(dim=1)
    samples = []
    for i, score, prediction, truth in zip(index, scores, outcome.prediction, label):
        sample = DataSample(metainfo=dict(sample_idx=int(i)))
        sample.set_gt_label(int(truth)).set_pred_score(score).set_pred_label(int(prediction))
        samples.append(sample)
    return samples


def route_metrics(outcomes: RobustOutcomes, num_experts: int) -> dict[str, float]:
    """Summarise the routes of an MoE: how experts share the images, and what attacks change.

    Returns:
        Shares in [0, 1]: ``'<name>/expert_share/<n>'`` of the decisions that went to expert n, without an attack and
        under each; ``'<attack>/route_changed'`` of the images with any decision changed by the attack;
        ``'<attack>/decisions_changed'`` of all decisions, where an image has several. Of an attack, on the images that
        it was run on; nothing of one that was run on none. Empty for a dense model.
    """
    clean = outcomes.by_name[CLEAN]
    if clean.expert.shape[1] == 0:
        return {}
    metrics = {}
    for name, outcome in outcomes.by_name.items():
        rows = outcome.attacked | (name == CLEAN)
        if not rows.any():
            continue
        for n in range(num_experts):
            metrics[f'{name}/expert_share/{n}'] = float((outcome.expert[rows] == n).double().mean())
        if name != CLEAN:
            changed = (outcome.expert != clean.expert)[rows]
            metrics[f'{name}/route_changed'] = float(changed.any(dim=1).double().mean())
            if changed.shape[1] > 1:
                metrics[f'{name}/decisions_changed'] = float(changed.double().mean())
    return metrics
