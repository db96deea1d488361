"""The demo goes on from its own results, and from no others."""

import importlib
from pathlib import Path

import pytest
from mmengine.config import Config

from mmadvmoe.runtime.launch import complete_loaders

ROOT = Path(__file__).parents[2]


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    module = importlib.import_module('demo')
    monkeypatch.setattr(module, 'WORK_DIR', tmp_path / 'demo')
    module.WORK_DIR.mkdir()
    return module


@pytest.mark.parametrize(('setting', 'kept'), [({}, True), ({'train_cfg.max_epochs': 7}, False)], ids=['same', 'other'])
def test_only_results_of_another_training_are_set_aside(demo, setting: dict, kept: bool) -> None:
    saved = Config.fromfile(demo.CONFIG)
    # As a run writes down its config: with the defaults of data loaders, and where it is.
    complete_loaders(saved, ['train_dataloader'])
    assert 'pin_memory' in saved.train_dataloader
    saved.work_dir, saved.resume = str(demo.WORK_DIR), True
    saved.merge_from_dict(setting)
    saved.dump(demo.WORK_DIR / demo.CONFIG.name)
    demo.set_aside_other_training(Config.fromfile(demo.CONFIG))
    assert demo.WORK_DIR.exists() == kept
    assert len(list(demo.WORK_DIR.parent.glob('demo_until_*'))) == (not kept)
