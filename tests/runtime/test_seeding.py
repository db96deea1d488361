"""Random states can be taken, given back and left alone; workers draw anew in every epoch."""

import random

import numpy as np
import pytest
import torch
from mmengine.runner import Runner
from resume_runs import NoisyPoints, loader

from mmadvmoe.runtime.seeding import get_rng_state, preserve_rng_state, set_rng_state


def draw():
    return [random.gauss(0, 1), np.random.randn(), torch.randn(()).item()]


def test_rng_state_survives_a_checkpoint_file(tmp_path):
    with preserve_rng_state():
        draw()
        torch.save(get_rng_state(), tmp_path / 'state.pt')
        expected = draw()
        set_rng_state(torch.load(tmp_path / 'state.pt', weights_only=True))
        assert draw() == expected


def test_preserve_rng_state_holds_when_the_block_raises():
    with preserve_rng_state():
        expected = draw()
    with pytest.raises(KeyError), preserve_rng_state():
        torch.manual_seed(0)
        draw()
        raise KeyError
    assert draw() == expected


def test_workers_augment_anew_in_every_epoch_and_on_every_rank(monkeypatch):
    cfg = loader(workers=2) | dict(dataset=NoisyPoints())
    cfg['sampler']['shuffle'] = False

    def epochs():
        torch.manual_seed(0)
        built = Runner.build_dataloader(cfg, seed=0)
        return [torch.cat([torch.stack(batch['inputs']) for batch in built]) for _ in range(2)]

    first, second = epochs()
    noise = first - torch.arange(12)[:, None] / 6
    assert (first != second).all()
    assert noise.unique().numel() == noise.numel()
    assert torch.equal(epochs()[0], first)
    monkeypatch.setenv('RANK', '1')
    assert (epochs()[0] != first).all()
