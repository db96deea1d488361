"""The command lines of the analysis of robustness, on small untrained networks and a few digits."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmpretrain.registry import MODELS

import mmadvmoe  # noqa: F401
from mmadvmoe.diagnosis.subject import write_json

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / 'tools' / 'analysis_tools'
HEAD = ['kind', 'format', 'config', 'checkpoint', 'num_images', 'seed', 'class_names', 'threat_model']
HEAD += ['routing', 'num_experts', 'routers', 'seconds']
FEW_STEPS = ['--cfg-options', 'test_cfg.attacks.pgd50.steps=3', 'test_cfg.attacks.routepgd50.steps=4']


def checkpoint_of(config, folder):
    torch.manual_seed(0)
    path = folder / f'{Path(config).stem}.pth'
    if not path.exists():
        torch.save(dict(state_dict=MODELS.build(Config.fromfile(config).model).state_dict()), path)
    return path


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('checkpoints')


@pytest.fixture
def run_tool(folder, monkeypatch, capsys):
    """``run_tool(name, config, *arguments)``: run a tool on an untrained network; gives what it prints."""

    def run(name, config, *arguments):
        config = ROOT / 'configs' / config
        argv = [str(TOOLS / name), str(config), str(checkpoint_of(config, folder)), *map(str, arguments)]
        monkeypatch.setattr(sys, 'argv', argv)
        runpy.run_path(argv[0], run_name='__main__')
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    ('config', 'routing', 'routers'),
    [
        ('advmoe_resnet18_digits.py', 'image', ['router']),
        ('advmoe_vit-small-moe_digits.py', 'token', ['layers.1.ffn']),
        ('baselines/at_sdense_resnet18_digits.py', None, []),
    ],
)
def test_dissection(run_tool, tmp_path, config, routing, routers):
    out = tmp_path / 'new' / 'dissection.json'
    printed = run_tool('dissect_robustness.py', config, '--num-images', 9, '--out', out, *FEW_STEPS)
    found = json.loads(out.read_text())
    assert set(HEAD) < set(found) and found['kind'] == 'dissection'
    assert (found['routing'], found['routers'], found['num_images']) == (routing, routers, 9)
    assert found['threat_model'] == dict(norm='Linf', eps=0.2, alpha=0.05, steps=3)
    assert found['class_names'] == list('0123456789')
    assert f'SA {found["sa"]:.1f} %' in printed and str(out) in printed
    assert ('This model is dense' in printed) == (routing is None)
    assert len(found['attacks']) == (1 if routing is None else 6)


def test_check_attacks(run_tool, tmp_path, folder):
    out = tmp_path / 'soundness.json'
    config = 'baselines/at_sdense_resnet18_digits.py'
    surrogate = ['--surrogate', ROOT / 'configs' / config, checkpoint_of(ROOT / 'configs' / config, folder)]
    few = ['--num-images', 6, '--queries', 5, '--attack', 'routepgd50']
    printed = run_tool('check_attacks.py', config, *few, *surrogate, '--out', out, *FEW_STEPS)
    found = json.loads(out.read_text())
    assert set(HEAD) < set(found) and found['kind'] == 'soundness'
    assert found['threat_model']['steps'] == 4
    for check in found['checks']:
        assert f'{check["status"]}  {check["title"]}' in printed
    warnings = [check['name'] for check in found['checks'] if check['status'] == 'WARN']
    assert found['num_warnings'] == len(warnings) and found['passed'] == (not warnings)
    assert f'{len(warnings)} warnings' in printed
    # The surrogate is the model itself.
    assert 'the given surrogate (same prediction on 100 %' in ' '.join(printed.split())


def test_strict_fails_on_a_warning(folder, monkeypatch):
    """A network that always gives one class has the same RA whatever the eps, so RA cannot be believed."""
    config = 'baselines/at_sdense_resnet18_digits.py'
    path = ROOT / 'configs' / config
    checkpoint = torch.load(checkpoint_of(path, folder))
    checkpoint['state_dict']['head.fc.weight'].zero_()
    checkpoint['state_dict']['head.fc.bias'].copy_(torch.arange(10.0))
    constant = folder / 'constant.pth'
    torch.save(checkpoint, constant)
    arguments = ['--num-images', 40, '--queries', 2, '--surrogate', path, constant]
    arguments += ['--cfg-options', 'test_cfg.attacks.pgd50.steps=2']
    argv = [str(TOOLS / 'check_attacks.py'), str(path), str(constant), *map(str, arguments), '--strict']
    monkeypatch.setattr(sys, 'argv', argv)
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(sys.argv[0], run_name='__main__')
    assert exit_.value.code == 1


@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        (['--num-images', 0], SystemExit, '2'),
        (['--out', 'found.txt'], SystemExit, '2'),
        (['--attack', 'pgd5'], ValueError, r"test_cfg.attacks: attack='pgd5' .*did you mean 'pgd50'"),
        (['--cfg-options', 'test_cfg.attacks=None'], ValueError, 'must set test_dataloader and test_cfg.attacks'),
    ],
)
def test_wrong_arguments(run_tool, arguments, error, message):
    with pytest.raises(error, match=message):
        run_tool('dissect_robustness.py', 'baselines/at_sdense_resnet18_digits.py', *arguments)


def test_files_hold_numbers_only(tmp_path):
    with pytest.raises(ValueError, match='not JSON compliant'):
        write_json(tmp_path / 'found.json', dict(ra=float('nan')))
    assert not list(tmp_path.iterdir())


def test_class_groups(run_tool, tmp_path):
    config, out, figure = 'baselines/at_sdense_resnet18_digits.py', tmp_path / 'groups.json', tmp_path / 'groups.png'
    few = ['--num-images', 20, '--num-train', 20, '--iterations', 1, '--num-groups', 2, 3, '--count', 1]
    printed = run_tool('find_class_groups.py', config, *few, '--out', out, '--figure', figure, *FEW_STEPS)
    found = json.loads(out.read_text())
    assert set(HEAD) < set(found) and found['kind'] == 'class_groups' and figure.stat().st_size > 1000
    confusion = torch.tensor(found['confusion'])
    assert confusion.shape == (10, 10) and confusion.sum() == 20
    assert [(each['place'], len(each['groups'])) for each in found['partitions']] == [
        ('1', 2),
        ('y mod N', 2),
        ('1', 3),
        ('y mod N', 3),
    ]
    for each in found['partitions']:
        assert sorted(index for group in each['groups'] for index in group) == list(range(10))
        assert each['router']['ra'] <= each['router']['sa']
    best = found['partitions'][found['best']]
    assert best['place'] == '1' and f'{best["router"]["flips"]:.1f} % of its routes flip' in printed
    assert f'backbone=dict(num_experts={len(best["groups"])}' in printed
    assert 'No router was tried' in run_tool('find_class_groups.py', config, *few, '--iterations', 0, *FEW_STEPS)
