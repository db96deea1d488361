"""configs/README.md, the metafiles and model-index.yml say what the configs give."""

import importlib
import re
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from mmengine.config import Config
from mmpretrain.apis.model import ModelHub
from mmpretrain.models import ImageClassifier
from modelindex.load_model_index import load

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / 'configs' / 'README.md').read_text(encoding='utf-8')
FILES = {
    path.relative_to(ROOT / 'configs').as_posix()
    for path in (ROOT / 'configs').rglob('*.py')
    if '_base_' not in path.parts
}


@pytest.fixture(scope='module', autouse=True)
def _tools() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / 'tools' / 'analysis_tools'))
        yield


@pytest.fixture(scope='module')
def table() -> ModuleType:
    return importlib.import_module('config_table')


@pytest.fixture(scope='module')
def index() -> ModuleType:
    return importlib.import_module('metafiles')


@pytest.mark.usefixtures('no_drawing_of_weights')
def test_tables_are_those_of_the_configs(table: ModuleType) -> None:
    committed = TEXT.split(table.BEGIN)[1].split(table.END)[0].strip()
    advice = 'run: python tools/analysis_tools/config_table.py'
    assert FILES == set(re.findall(r'\]\(([^)]+\.py)\)', committed)), advice
    assert committed == table.tables(), advice
    savings = [float(number) for number in re.findall(r'\| ([\d.]+)% \|', committed)]
    assert len(savings) == 16 and min(savings) > 50


def test_a_row_links_the_configs_of_its_data_set_alone(table: ModuleType) -> None:
    rows = [line.split(' | ') for line in TEXT.splitlines() if re.search(r'% \|$', line)]
    words = {title: word for word, title in table.DATA_SETS.items()}
    for row in rows:
        linked = re.findall(r'\[([^]]+)\]\(([^)]+)\.py\)', ' | '.join(row))
        data = {path.split('_')[3 if path.startswith('baselines') else 2] for _, path in linked}
        assert data == {words[row[1]]}, row[:2]
        kinds = ['Dense', 'S-Dense', 'Sparse', 'Sparse scores', 'MoE'], ['Dense', 'S-Dense', 'MoE']
        assert Counter(['config', *kinds[0], *kinds[1]]) <= Counter(text for text, _ in linked)


@pytest.mark.usefixtures('no_drawing_of_weights')
def test_metafiles_are_those_of_the_configs(index: ModuleType) -> None:
    for path, text in index.metafiles().items():
        assert path.read_text(encoding='utf-8') == text, 'run: python tools/analysis_tools/metafiles.py'


def test_every_config_is_in_the_model_index_once() -> None:
    imports = yaml.safe_load((ROOT / 'model-index.yml').read_text(encoding='utf-8'))['Import']
    parts = [yaml.safe_load((ROOT / path).read_text(encoding='utf-8')) for path in imports]
    models = [model for part in parts for model in part['Models']]
    assert sorted(model['Config'] for model in models) == sorted(f'configs/{path}' for path in FILES)
    assert len({model['Name'].lower() for model in models}) == len(models)
    collections = {each['Name']: each for part in parts for each in part['Collections']}
    assert {model['In Collection'] for model in models} == set(collections)
    for each in collections.values():
        assert each['Paper']['URL'] == 'https://arxiv.org/abs/2308.10110'
        assert (ROOT / each['README']).is_file() and (ROOT / each['Code']['URL']).is_file()
    for model in models:
        assert model['Metadata']['FLOPs'] > 0 and model['Metadata']['Parameters'] > 0
        # No result is claimed without a run that gave it.
        (result,) = model['Results']
        # What is measured belongs to weights.
        assert (result['Metrics'] is None) == ('Weights' not in model)
        assert result['Dataset'] == model['Metadata']['Training Data']


def test_pruned_networks_cost_what_a_pathway_costs() -> None:
    parts = yaml.safe_load((ROOT / 'configs' / 'baselines' / 'metafile.yml').read_text(encoding='utf-8'))
    flops = {model['Name']: model['Metadata']['FLOPs'] for model in parts['Models']}
    pruned = [name for name in flops if name.startswith('at_sparse_')]
    assert len(pruned) == 2 * 17
    for name in pruned:
        narrow = name.replace('_sparse_', '_sdense_').removesuffix('_scores')
        assert flops[name] == pytest.approx(flops[narrow], rel=0.05), name


def test_mmpretrain_finds_the_models_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the reader that MIM and MMPretrain share, as the README shows it."""
    assert len(load(str(ROOT / 'model-index.yml')).models) == len(FILES)
    (code,) = re.findall(r'```python\n(.*?)```', TEXT, re.DOTALL)
    monkeypatch.chdir(ROOT)
    names: dict = {}
    exec(code, names)
    assert isinstance(names['model'], ImageClassifier) and names['model'].backbone.num_experts == 2
    for path in FILES:
        entry = ModelHub._models_dict[Path(path).stem]
        assert entry.config == str(ROOT / 'configs' / path)
        assert entry.full_model.paper['URL'] == 'https://arxiv.org/abs/2308.10110'


def test_commands_of_the_readme_name_files_and_checkpoints_that_there_are() -> None:
    commands = [command.split() for command in re.findall(r'^python .*|(?<=`)python [^`]*', TEXT, re.MULTILINE)]
    assert {command[1] for command in commands} == {
        'tools/train.py',
        'tools/test.py',
        'tools/dataset_converters/imagenet_annotations.py',
        'tools/analysis_tools/get_flops.py',
        'tools/analysis_tools/config_table.py',
        'tools/analysis_tools/metafiles.py',
    }
    for command in commands:
        assert all((ROOT / word).is_file() for word in command[1:] if word.startswith(('tools/', 'configs/')))
    (folder,) = re.findall(r'work_dirs/(\w[\w-]*)/best_\*\.pth', TEXT)
    cfg = Config.fromfile(ROOT / 'configs' / f'{folder}.py')
    assert cfg.default_hooks.checkpoint.save_best
