"""Configs in MMEngine's pure Python style, which give types as classes and import their bases, through the tools."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

TOOLS = Path(__file__).parents[2] / 'tools'
DATA = """
from mmengine.dataset import DefaultSampler
from mmpretrain.datasets import PackInputs
from mmpretrain.evaluation import Accuracy

from mmadvmoe.datasets import Digits

train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    drop_last=True,
    sampler=dict(type=DefaultSampler, shuffle=True),
    dataset=dict(type=Digits, split='train', indices=16, pipeline=[dict(type=PackInputs)]))
test_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type=DefaultSampler, shuffle=False),
    dataset=dict(type=Digits, split='test', indices=8, pipeline=[dict(type=PackInputs)]))
test_evaluator = dict(type=Accuracy)
"""
CONFIG = """
from mmengine.config import read_base

with read_base():
    from .data import *

from mmengine.hooks import SyncBuffersHook
from mmengine.optim import CosineAnnealingLR, OptimWrapper
from mmpretrain.engine import ClassNumCheckHook, VisualizationHook
from mmpretrain.models import GlobalAveragePooling, LinearClsHead, ResNet_CIFAR
from torch.optim import SGD

from mmadvmoe.attacks import PGD, RoutePGD, TRADESAttack
from mmadvmoe.evaluation import RobustTestLoop
from mmadvmoe.models import AdvDataPreprocessor, RobustClassifier, RouterLabelLoss, TRADESLoss
from mmadvmoe.moe import MoEBackbone, ResNetRouter
from mmadvmoe.runtime import ExactResumeHook, PreflightHook, SafeCheckpointHook
from mmadvmoe.training import AlternatingOptimHook, AlternatingOptimWrapperConstructor, RouterHealthHook

default_scope = 'mmpretrain'
model = dict(
    type=RobustClassifier,
    data_preprocessor=dict(
        type=AdvDataPreprocessor, num_classes=10, attack=dict(type=TRADESAttack, eps=0.2, alpha=0.1, steps=1)),
    backbone=dict(
        type=MoEBackbone,
        num_experts=2,
        include=[r'layer1.*conv\\d'],
        router=dict(type=ResNetRouter, base_channels=2, num_blocks=1),
        backbone=dict(type=ResNet_CIFAR, depth=18, num_stages=2, strides=(1, 2),
                      dilations=(1, 1), out_indices=(1,), stem_channels=2, base_channels=2)),
    neck=dict(type=GlobalAveragePooling),
    head=dict(type=LinearClsHead, num_classes=10, in_channels=4),
    robust_loss=dict(type=TRADESLoss, beta=6.0),
    router_loss=dict(type=RouterLabelLoss))
train_cfg = dict(by_epoch=True, max_epochs=1)
optim_wrapper = dict(
    constructor=AlternatingOptimWrapperConstructor,
    experts=dict(type=OptimWrapper, optimizer=dict(type=SGD, lr=0.1)),
    router=dict(type=OptimWrapper, optimizer=dict(type=SGD, lr=0.01)))
param_scheduler = dict(
    experts=[dict(type=CosineAnnealingLR, by_epoch=True, convert_to_iter_based=True)],
    router=[dict(type=CosineAnnealingLR, by_epoch=True, convert_to_iter_based=True)])
test_cfg = dict(type=RobustTestLoop, attacks=dict(pgd=dict(type=PGD, eps=0.2, alpha=0.1, steps=1)))
custom_hooks = [
    dict(type=AlternatingOptimHook),
    dict(type=RouterHealthHook),
    dict(type=PreflightHook),
    dict(type=ExactResumeHook),
    dict(type=SyncBuffersHook),
    dict(type=ClassNumCheckHook)]
default_hooks = dict(
    checkpoint=dict(type=SafeCheckpointHook, interval=1), visualization=dict(type=VisualizationHook))
log_level = 'ERROR'
"""


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Call a tool as from the command line, in a folder with the config ``config.py``."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'config.py').write_text(CONFIG)
    (tmp_path / 'data.py').write_text(DATA)

    def run(name, *arguments):
        options = [f'experiment_name={name}_{tmp_path.name}', 'work_dir=work']
        monkeypatch.setattr('sys.argv', [name, 'config.py', *arguments, '--cfg-options', *options])
        return runpy.run_path(str(TOOLS / name), run_name='__main__')

    return run


def test_types_given_as_classes_train_and_are_tested(tool, tmp_path):
    tool('train.py', '--amp')
    checkpoint = tmp_path / 'work/epoch_1.pth'
    assert checkpoint.is_file()
    assert 'CPUAmpOptimWrapper' in str(Config.fromfile(tmp_path / 'work/config.py').optim_wrapper)
    tool('test.py', str(checkpoint), '--attacks', 'pgd2', 'routepgd2', '--eps', '0.2', '--out', 'outcomes/')
    attacks = json.loads((tmp_path / 'outcomes/outcomes.jsonl').read_text().splitlines()[0])['attacks']
    assert list(attacks) == ['pgd2', 'pgd2-held', 'routepgd2']


@pytest.mark.parametrize('arguments', [(), ('--verbose',), ('--dry-run',)], ids=' '.join)
def test_less_data_than_a_batch_is_named_before_mmengine_counts_batches(tool, tmp_path, arguments):
    (tmp_path / 'data.py').write_text(DATA.replace('indices=16', 'indices=7'))
    with pytest.raises(ValueError, match=r'train_dataloader\.batch_size=8 is more than the 7 images .* drop_last=True'):
        tool('train.py', *arguments)
