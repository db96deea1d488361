import pytest

from mmadvmoe.datasets import ChunkSampler


@pytest.mark.parametrize('world_size', [1, 2, 3, 7])
@pytest.mark.parametrize('size', [1, 12, 13, 15])
def test_processes_share_whole_chunks(monkeypatch: pytest.MonkeyPatch, size: int, world_size: int) -> None:
    """Every image once, over all processes, and never a chunk cut in two."""
    seen = []
    for rank in range(world_size):
        monkeypatch.setattr('mmadvmoe.datasets.splits.get_dist_info', lambda rank=rank: (rank, world_size))
        sampler = ChunkSampler(range(size), chunk_size=4)
        indices = list(sampler)
        assert len(indices) == len(sampler)
        assert indices == [i for c in sampler.chunks() for i in sampler.chunk(c)]
        for start in range(0, len(indices), 4):
            chunk = indices[start : start + 4]
            assert chunk == list(range(chunk[0], min(chunk[0] // 4 * 4 + 4, size)))
            assert chunk[0] % 4 == 0
        seen += indices
    assert sorted(seen) == list(range(size))


def test_chunk_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match='chunk_size must be at least 1, but got 0'):
        ChunkSampler(range(3), chunk_size=0)
