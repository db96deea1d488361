"""The order in which robust evaluation goes through a data set."""

from __future__ import annotations

from collections.abc import Iterator, Sized

from mmengine.dist import get_dist_info
from mmpretrain.registry import DATA_SAMPLERS
from torch.utils.data import Sampler


@DATA_SAMPLERS.register_module()
class ChunkSampler(Sampler):
    """Deal whole chunks of consecutive images out to the processes, in data set order.

    Chunk c holds images [c·S, (c+1)·S); process r of W takes chunks r, r + W, r + 2W, ... Every image is visited
    exactly once and none is repeated to even out the processes, so the processes may do different numbers of batches.

    Args:
        dataset: The data set.
        chunk_size: S, images in a chunk; the last chunk may hold fewer.
        seed: Taken because the Runner gives one to every sampler; nothing here is random.

    Raises:
        ValueError: If ``chunk_size`` is below 1.
    """

    def __init__(self, dataset: Sized, chunk_size: int, seed: int | None = None) -> None:
        if chunk_size < 1:
            raise ValueError(f'chunk_size must be at least 1, but got {chunk_size}.')
        self.dataset = dataset
        self.chunk_size = chunk_size
        self.rank, self.world_size = get_dist_info()

    def chunks(self) -> range:
        """Number the chunks of this process, in the order in which their images come."""
        num_chunks = -(-len(self.dataset) // self.chunk_size)
        return range(self.rank, num_chunks, self.world_size)

    def chunk(self, index: int) -> range:
        """Give the indices of the images of one chunk."""
        start = index * self.chunk_size
        return range(start, min(start + self.chunk_size, len(self.dataset)))

    def __iter__(self) -> Iterator[int]:
        for index in self.chunks():
            yield from self.chunk(index)

    def __len__(self) -> int:
        return sum(len(self.chunk(index)) for index in self.chunks())
