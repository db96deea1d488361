"""How the package is built: layers without circles, its size, and what importing it changes elsewhere."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'mmadvmoe'
# As docs/design.md has them, from top to bottom. A module imports from layers below its own, and from its own package.
LAYERS = (
    'tools',
    'report',
    'diagnosis',
    'apis',
    'training',
    'visualization',
    'evaluation',
    'runtime',
    'pruning',
    'models',
    'cost',
    'attacks',
    'moe',
    'datasets',
    'registry',
    'utils',
    'version',
)
MAX_FILES, MAX_LINES, MAX_LINES_OF_A_FILE = 99, 17_412, 400
FILES = sorted(PACKAGE.rglob('*.py'))
TOOLS = sorted((ROOT / 'tools').rglob('*.py'))


def module_of(file: Path) -> str:
    """Dotted name of a file."""
    parts = file.relative_to(ROOT).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


MODULES = {module_of(file): file for file in FILES}


def imported_by(file: Path) -> Iterator[tuple[str, int]]:
    """Modules of the package that a file imports, wherever in it, each with its line."""
    own = module_of(file).split('.')
    for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # One dot is the package of the file, which is itself for an __init__.py.
            package = own[: len(own) - node.level + (file.name == '__init__.py')] if node.level else []
            base = '.'.join([*package, *([node.module] if node.module else [])])
            names = [f'{base}.{alias.name}' for alias in node.names]
        else:
            continue
        for name in names:
            while name.startswith('mmadvmoe') and name not in MODULES:
                name = name.rpartition('.')[0]
            if name in MODULES:
                yield name, node.lineno


def layer_of(module: str) -> str:
    """The package or file right below mmadvmoe that a module belongs to."""
    return module.split('.')[1] if '.' in module else 'mmadvmoe'


def test_docs_name_the_same_layers() -> None:
    text = (ROOT / 'docs' / 'design.md').read_text(encoding='utf-8')
    (drawing,) = re.findall(r'```\n(tools/ .*?)```', text, flags=re.DOTALL)
    assert tuple(re.findall(r'(\w+)(?:\.py|/)', drawing)) == LAYERS


def test_every_file_has_a_layer() -> None:
    # Two that no layer may import: what `import mmadvmoe` runs. `mmadvmoe.tools` starts the tools of an installation.
    assert {layer_of(module) for module in MODULES} - {'mmadvmoe', '_requirements'} == set(LAYERS)


def test_imports_go_down() -> None:
    upwards = []
    for file in [*FILES, *TOOLS]:
        module = module_of(file)
        own = 'tools' if file in TOOLS else layer_of(module)
        if own in ('mmadvmoe', '_requirements'):
            continue
        for name, line in imported_by(file):
            other = layer_of(name)
            # `import mmadvmoe` runs before any module of the package does.
            if other in (own, 'mmadvmoe'):
                continue
            if other not in LAYERS or LAYERS.index(other) < LAYERS.index(own):
                upwards.append(f'{file.relative_to(ROOT)}:{line} imports {name}, but {own} is below {other}')
    assert not upwards, 'imports that go up:\n' + '\n'.join(upwards)


def test_modules_import_each_other_in_no_circle() -> None:
    # Inside a package, `from . import x` of its __init__.py is no arrow: importing a module runs it anyhow.
    arrows = {
        module: {name for name, _ in imported_by(file) if name != module and MODULES[name].name != '__init__.py'}
        for module, file in MODULES.items()
    }
    done: set[str] = set()

    def follow(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, 'a circle of imports: ' + ' -> '.join((*path[path.index(module) :], module))
        if module not in done:
            for name in sorted(arrows[module]):
                follow(name, (*path, module))
            done.add(module)

    for module in MODULES:
        follow(module, ())


def test_size() -> None:
    lines = {file: len(file.read_text(encoding='utf-8').splitlines()) for file in FILES}
    long = [f'{file.relative_to(ROOT)}: {count}' for file, count in lines.items() if count > MAX_LINES_OF_A_FILE]
    assert not long, f'files of more than {MAX_LINES_OF_A_FILE} lines: {long}'
    assert len(lines) <= MAX_FILES
    assert sum(lines.values()) <= MAX_LINES


@pytest.mark.parametrize('file', FILES, ids=module_of)
def test_names_of_configs_are_known_in_tools_alone(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding='utf-8'))
    documentation = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and isinstance(node.body[0], ast.Expr)
    }
    # The configs of this repository start so: advmoe_resnet18_digits.py, baselines/at_dense_resnet18_digits.py, ...
    known = [
        f'{node.value!r} in line {node.lineno}'
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation
        if re.search(r'advmoe_\w*(resnet|wrn|vgg|densenet|vit)|\bat_(dense|sdense|sparse|moe|vit)', node.value)
    ]
    assert not known


# Run in a process of its own. Prints what differs after `import mmadvmoe` from what MMEngine, MMPretrain, torch,
# torchvision and NumPy were after all of MMEngine and MMPretrain had been imported.
_CHANGES = '''
import importlib, inspect, os, pkgutil, random, sys, types, warnings
warnings.simplefilter('ignore')
import numpy, torch, mmengine, mmpretrain, torchattacks, sklearn, matplotlib.pyplot
from torch import optim, utils

OTHERS = ('mmengine', 'mmpretrain', 'mmcv', 'torch', 'torchvision', 'torchattacks', 'numpy')
for package in (mmengine, mmpretrain):
    for each in pkgutil.walk_packages(package.__path__, package.__name__ + '.', onerror=lambda name: None):
        if '.testing' in each.name or each.name.startswith('mmengine._strategy'):
            continue  # optional, and a strategy swaps functions of DeepSpeed
        try:
            importlib.import_module(each.name)
        except (ImportError, KeyError):
            pass  # of optional packages; a KeyError because MMPretrain has registered a stand-in for what needs them
from mmengine.fileio.backends import registry_utils
from mmengine.registry import Registry
from mmengine.runner import CheckpointLoader

def functions():
    """All functions, classes and their methods in all loaded modules, each under its name."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split('.')[0] not in OTHERS or not isinstance(module, types.ModuleType):
            continue
        for key, value in list(vars(module).items()):
            if callable(value):
                found[f'{name}.{key}'] = value
            if inspect.isclass(value) and value.__module__ == name:
                for inner, method in list(vars(value).items()):
                    if callable(method) or isinstance(method, (classmethod, staticmethod, property)):
                        found[f'{name}.{key}.{inner}'] = method
    return found

def components():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split('.')[0] in OTHERS and isinstance(module, types.ModuleType):
            for registry in list(vars(module).values()):
                if isinstance(registry, Registry):
                    for key, value in registry._module_dict.items():
                        found[registry.scope, registry.name, key] = value
    return found

def settings():
    yield 'loader', dict(CheckpointLoader._schemes)
    yield 'backend', dict(registry_utils.backends)
    yield 'backend of prefix', dict(registry_utils.prefix_to_backends)
    yield 'safe global', {each[1] if isinstance(each, tuple) else f'{each.__module__}.{each.__qualname__}': each
        for each in torch.serialization.get_safe_globals()}
    yield 'environment', dict(os.environ)
    yield 'default', dict(dtype=torch.get_default_dtype(), threads=torch.get_num_threads(),
        deterministic=torch.are_deterministic_algorithms_enabled(), grad=torch.is_grad_enabled(),
        mkldnn=torch.backends.mkldnn.enabled, tf32=torch.backends.cudnn.allow_tf32,
        benchmark=torch.backends.cudnn.benchmark,
        print=repr(numpy.get_printoptions()), errors=repr(numpy.geterr()), warnings=repr(warnings.filters),
        matplotlib=repr(dict(matplotlib.rcParams)), hook=sys.excepthook)
    yield 'random state', dict(torch=torch.get_rng_state().tolist(), numpy=repr(numpy.random.get_state()),
        python=random.getstate())
    yield 'component', components()

before, others = dict(settings()), functions()
import mmadvmoe
for kind, now in settings():
    for key in {**before[kind], **now}:
        old, new = before[kind].get(key), now.get(key)
        if old is not new and old != new:
            print(kind, key if isinstance(key, str) else '/'.join(key), 'new' if old is None else 'changed',
                getattr(new, '__module__', type(new).__module__), sep=' | ')
now = functions()
for key, value in others.items():
    if now.get(key) is not value and now.get(key) != value:
        print('function', key, 'changed', getattr(now.get(key), '__module__', '?'), sep=' | ')
'''


@pytest.fixture(scope='module')
def changes() -> list[list[str]]:
    """(kind, name, new or changed, module of what is there now) of each difference."""
    done = subprocess.run([sys.executable, '-c', _CHANGES], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [line.split(' | ') for line in done.stdout.splitlines() if ' | ' in line]


def test_import_changes_what_the_readme_lists_and_nothing_else(changes: list[list[str]]) -> None:
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    (section,) = re.findall(r'\n#+ What the import changes\n(.*?)(?=\n#|\Z)', text, flags=re.DOTALL)
    loaders, safe_globals = (set(re.findall(r'`([^`]+)`', item)) for item in section.split('\n- ')[-2:])
    found: dict[str, set[str]] = {'loader': set(), 'safe global': set()}
    for kind, name, state, module in changes:
        if kind == 'component':
            assert (state, module.split('.')[0]) == ('new', 'mmadvmoe'), f'{name} is {state}, from {module}'
        else:
            assert kind in found, f'import mmadvmoe changes a {kind}: {name}'
            found[kind].add(name)
    assert found['loader'] == loaders - {'CheckpointLoader'} | {''}, 'the empty scheme is that of local files'
    short = {re.sub(r'^numpy\.dtypes\..*', 'numpy.dtypes', name).split('.')[-1] for name in found['safe global']}
    assert short == {name.split('.')[-1] for name in safe_globals - {'weights_only=True'}}
