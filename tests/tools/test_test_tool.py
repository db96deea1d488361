"""tools/test.py under attacks chosen by name."""

import errno
import importlib.util
import itertools
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import mmengine
import pytest
import torch
from mmengine.config import Config
from mmpretrain.registry import MODELS

import mmadvmoe  # noqa: F401
from mmadvmoe.runtime.safe_load import CheckpointError

TOOL = Path(__file__).parents[2] / 'tools/test.py'
CONFIG = """
custom_imports = dict(imports=['mmadvmoe'])
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='MoEBackbone',
        num_experts=2,
        include=[r'layer1.*conv\\d'],
        router=dict(type='ResNetRouter', base_channels=4, num_blocks=1),
        backbone=dict(type='ResNet_CIFAR', depth=18, num_stages=2, strides=(1, 2),
                      dilations=(1, 1), out_indices=(1,), stem_channels=4, base_channels=4)),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=10, in_channels=8),
    data_preprocessor=dict(type='AdvDataPreprocessor'))
test_dataloader = dict(
    batch_size=5,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='Digits', split='test', indices=20, pipeline=[dict(type='PackInputs')]))
test_evaluator = dict(type='Accuracy')
test_cfg = dict(
    type='RobustTestLoop',
    chunk_size=8,
    attacks=dict(
        pgd2=dict(type='PGD', eps=0.2, alpha=0.1, steps=2),
        route=dict(type='RoutePGD', eps=0.2, alpha=0.1, steps=2)),
    survivors_only=['route'],
    worst_of=dict(ra=['pgd2', 'route'], weak=['pgd2']))
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=1), checkpoint=dict(type='SafeCheckpointHook', interval=-1))
log_level = 'WARNING'
"""
_RUNS = itertools.count()


@pytest.fixture(autouse=True)
def _few_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def test_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Call the tool as from the command line; folders are relative to ``tmp_path``."""
    spec = importlib.util.spec_from_file_location('test_tool', TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    config = tmp_path / 'config.py'
    config.write_text(CONFIG)
    torch.manual_seed(0)
    model = MODELS.build(Config.fromfile(config).model)
    torch.save(dict(meta={}, state_dict=model.state_dict()), tmp_path / 'epoch_1.pth')
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> None:
        # MMEngine keeps one logger for each name of an experiment.
        options = [f'experiment_name=tool_{tmp_path.name}_{next(_RUNS)}', 'work_dir=work']
        if '--cfg-options' not in arguments:
            arguments = (*arguments, '--cfg-options')
        monkeypatch.setattr('sys.argv', ['test.py', 'config.py', 'epoch_1.pth', *arguments, *options])
        tool.main()

    return run


def _attacks(folder: str) -> list[str]:
    return list(json.loads((Path(folder) / 'outcomes.jsonl').read_text().splitlines()[0])['attacks'])


def test_the_checkpoint_that_is_named_is_tested_whatever_options_say_of_training(test_tool: Callable) -> None:
    other = torch.load('epoch_1.pth', weights_only=True)
    other['state_dict'] = {key: torch.zeros_like(value) for key, value in other['state_dict'].items()}
    torch.save(other, 'start.pth')
    test_tool('--attacks', 'fgsm', '--out', 'a')
    test_tool('--attacks', 'fgsm', '--out', 'b', '--cfg-options', 'load_from=start.pth', 'resume=True')
    assert Path('a/outcomes.jsonl').read_text() == Path('b/outcomes.jsonl').read_text()
    sha256 = [json.loads(Path(f'{name}/run.json').read_text())['settings']['model']['sha256'] for name in 'ab']
    assert sha256[0] == sha256[1]


def test_outcomes_of_named_attacks_whatever_the_batch_size(test_tool: Callable) -> None:
    for size in ('16', '128'):
        test_tool('--attacks', 'fgsm', 'pgd2', '--out', size, '--cfg-options', f'test_dataloader.batch_size={size}')
    # The radius is that of the config, and RoutePGD comes beside what was asked for.
    assert _attacks('16') == ['fgsm', 'routepgd2', 'fgsm-held', 'pgd2', 'pgd2-held']
    settings = json.loads(Path('16/run.json').read_text())['settings']
    assert settings['attacks']['fgsm'] == dict(type='FGSM', eps=0.2)
    assert settings['chunk_size'] == 8 and settings['model']['num_experts'] == 2
    for name in ('outcomes.jsonl', 'metrics.json', 'run.json'):
        assert Path('16', name).read_bytes() == Path('128', name).read_bytes()
    metrics = json.loads(Path('16/metrics.json').read_text())
    # Groups of attacks that were not run are not reported.
    assert 'weak/accuracy/top1' in metrics and 'ra/accuracy/top1' not in metrics


def test_the_attacks_of_the_config_as_a_cascade(test_tool: Callable) -> None:
    test_tool('--cascade', '--out', 'outcomes')
    assert _attacks('outcomes') == ['pgd2', 'route']
    settings = json.loads(Path('outcomes/run.json').read_text())['settings']
    assert settings['survivors_only'] == ['pgd2', 'route']
    assert {'ra/accuracy/top1', 'weak/accuracy/top1'} <= json.loads(Path('outcomes/metrics.json').read_text()).keys()


def test_another_radius_needs_another_folder_or_overwrite(test_tool: Callable) -> None:
    test_tool('--attacks', 'route', '--eps', '8/255', '--out', 'outcomes')
    settings = json.loads(Path('outcomes/run.json').read_text())['settings']
    assert settings['attacks']['route'] == dict(type='RoutePGD', eps=8 / 255, alpha=pytest.approx(4 / 255), steps=2)
    with pytest.raises(
        ValueError, match=r'another evaluation: settings\.attacks\.route\.eps is 0\.03\d+ there and 0\.1'
    ):
        test_tool('--attacks', 'route', '--eps', '0.1', '--out', 'outcomes')
    test_tool('--attacks', 'route', '--eps', '0.1', '--out', 'outcomes', '--overwrite')
    assert json.loads(Path('outcomes/run.json').read_text())['settings']['attacks']['route']['eps'] == 0.1


def test_options_of_attacks_are_those_of_the_named_ones(test_tool: Callable) -> None:
    radii = [f'test_cfg.attacks.{name}.eps=0.05' for name in ('pgd2', 'route')]
    test_tool('--attacks', 'pgd2', 'fgsm', '--out', 'outcomes', '--cfg-options', *radii)
    attacks = json.loads(Path('outcomes/run.json').read_text())['settings']['attacks']
    assert list(attacks) == ['pgd2', 'routepgd2', 'pgd2-held', 'fgsm', 'fgsm-held']
    assert {attack['eps'] for attack in attacks.values()} == {0.05}
    with pytest.raises(ValueError, match=r"test_cfg\.attacks\.pgd3\.eps: attack='pgd3'.*did you mean 'pgd2'"):
        test_tool('--attacks', 'pgd2', '--cfg-options', 'test_cfg.attacks.pgd3.eps=0.05')


def test_a_config_without_attacks_needs_a_radius(test_tool: Callable) -> None:
    Path('config.py').write_text(CONFIG + 'test_cfg = dict()\n')
    with pytest.raises(ValueError, match=r'--out is for tests under attacks, .* add --attacks'):
        test_tool('--out', 'outcomes')
    with pytest.raises(
        ValueError, match=r"'fgsm' needs a radius in norm Linf \(eps, or --eps\): no attack of the config"
    ):
        test_tool('--attacks', 'fgsm', '--out', 'outcomes')
    test_tool('--attacks', 'fgsm', '--eps', '0.1', '--out', 'outcomes')
    assert _attacks('outcomes') == ['fgsm', 'routepgd50', 'fgsm-held']


def test_files_are_written_as_ever(test_tool: Callable) -> None:
    test_tool('--out', 'pred.pkl')
    assert len(pickle.loads(Path('pred.pkl').read_bytes())) == 20
    test_tool('--out', 'metrics.json', '--out-item', 'metrics')
    assert 'worst/accuracy/top1' in json.loads(Path('metrics.json').read_text())


def test_the_value_of_any_metric_is_written(test_tool: Callable) -> None:
    Path('config.py').write_text(CONFIG + "test_evaluator = [dict(type='Accuracy'), dict(type='ConfusionMatrix')]\n")
    test_tool('--out', 'outcomes')
    test_tool('--out', 'metrics.yaml', '--out-item', 'metrics')
    for path in ('outcomes/metrics.json', 'metrics.yaml'):
        matrix = mmengine.load(path)['worst/confusion_matrix/result']
        assert torch.tensor(matrix).shape == (10, 10) and torch.tensor(matrix).sum() == 20


@pytest.mark.parametrize('item', ['metrics', 'pred'])
def test_a_file_that_cannot_be_written_is_told_before_the_test(
    test_tool: Callable, item: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = dict(metrics='out.json', pred='out.pkl')[item]
    Path(out).write_text('before')

    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr('os.fsync', no_space)
        patch.setattr('mmengine.runner.Runner.test', lambda self: pytest.fail('the test ran'))
        with pytest.raises(OSError, match=f"--out: '{out}' cannot be written .No space left"):
            test_tool('--out', out, '--out-item', item)
    # Full only when the test is over.
    calls = itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr('os.fsync', lambda descriptor: next(calls) > 1 and no_space(descriptor))
        with pytest.raises(OSError, match='No space left'):
            test_tool('--out', out, '--out-item', item)
    assert Path(out).read_text() == 'before'
    assert not [path for path in Path().iterdir() if path.name.startswith(f'.{out}')]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (
            ('--out', 'metrics.json'),
            'must end in .pkl or .pickle; a folder for the outcomes of all images has no ending',
        ),
        (('--overwrite',), '--overwrite is about a folder of outcomes: add --out FOLDER'),
        (('--overwrite', '--out', 'a.pkl'), '--overwrite is about a folder'),
        (('--eps', '0.1'), '--eps is that of the attacks which --attacks names: add --attacks'),
        (('--eps', 'much', '--attacks', 'fgsm'), "--eps: 'much' must be a number such as 0.2 or 8/255"),
    ],
)
def test_arguments_that_do_not_go_together(
    test_tool: Callable, capsys: pytest.CaptureFixture, arguments: tuple, message: str
) -> None:
    with pytest.raises(SystemExit):
        test_tool(*arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        (('--attacks', 'pgd2', 'pgg'), ValueError, "no attack 'pgg'; allowed: pgd2, route, fgsm"),
        (('--attacks', 'fgsm', '--eps', '51'), ValueError, r'eps=51\.0 is above 1, .*write eps=51 / 255'),
        (('--cfg-options', 'model.head.num_classes=7'), ValueError, 'num_classes=7 differs from the 10'),
    ],
)
def test_what_does_not_fit_is_named(
    test_tool: Callable, arguments: tuple, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        test_tool(*arguments)


def test_a_checkpoint_of_other_classes_is_refused(test_tool: Callable) -> None:
    weights = torch.load('epoch_1.pth', weights_only=True)
    weights['state_dict']['head.fc.weight'] = torch.zeros(7, 8)
    weights['state_dict']['head.fc.bias'] = torch.zeros(7)
    torch.save(weights, 'epoch_1.pth')
    with pytest.raises(CheckpointError, match=r'head\.fc\.weight \(7, 8\) in the file, \(10, 8\) in the model'):
        test_tool('--attacks', 'fgsm', '--out', 'outcomes')
    assert not Path('outcomes').exists()
