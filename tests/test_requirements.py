"""The versions that the import accepts, and what setup.py says of the package."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from setuptools import find_packages

from mmadvmoe._requirements import REQUIREMENTS, check_requirements

ROOT = Path(__file__).parents[1]
GOOD = {'mmcv-lite': '2.2.0', 'mmengine': '0.10.7', 'mmpretrain': '1.2.0'}


@pytest.fixture
def installed(monkeypatch):
    """Pretend that exactly the given distributions are installed."""

    def pretend(versions):
        def version(name):
            if name not in versions:
                raise metadata.PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(metadata, 'version', version)

    return pretend


def test_this_environment_is_accepted():
    check_requirements()


@pytest.mark.parametrize(
    'versions',
    [
        GOOD,
        {'mmcv': '2.2.0', 'mmengine': '0.10.7', 'mmpretrain': '1.2.0'},
        {'mmcv': '2.1.0+cu118', 'mmengine': '0.10.8rc1', 'mmpretrain': '1.3.0'},
    ],
)
def test_lite_full_and_local_versions_are_accepted(installed, versions):
    installed(versions)
    check_requirements()


@pytest.mark.parametrize(
    ('change', 'parts'),
    [
        ({'mmcv-lite': None}, ['mmcv is not installed', 'pip install "mmcv-lite>=2.0.0,<2.4.0"']),
        (
            {'mmcv-lite': None, 'mmcv-full': '1.7.2'},
            ['mmcv-full 1.7.2', '>=2.0.0,<2.4.0', 'pip uninstall -y mmcv-full && pip install'],
        ),
        ({'mmcv-lite': '2.4.0'}, ['mmcv-lite 2.4.0', 'mmcv>=2.0.0,<2.4.0']),
        ({'mmcv': '1.7.0'}, ['mmcv 1.7.0', 'pip uninstall -y mmcv &&']),
        ({'mmengine': None}, ['mmengine is not installed', 'pip install "mmengine>=0.10.7,<0.11']),
        ({'mmengine': '0.8.3'}, ['mmengine 0.8.3', 'mmengine>=0.10.7,<0.11.0']),
        ({'mmengine': '0.11.0'}, ['mmengine 0.11.0', 'mmengine>=0.10.7,<0.11.0']),
        ({'mmpretrain': None}, ['mmpretrain is not installed', 'pip install "mmpretrain>=1.2.0']),
        ({'mmpretrain': '1.0.2'}, ['mmpretrain 1.0.2', 'mmpretrain>=1.2.0,<2.0.0']),
    ],
)
def test_missing_old_and_new_packages_are_named_with_their_cure(installed, change, parts):
    installed({name: v for name, v in {**GOOD, **change}.items() if v is not None})
    with pytest.raises(ImportError) as error:
        check_requirements()
    for part in parts:
        assert part in str(error.value)


def test_all_problems_are_told_at_once(installed):
    installed({'mmengine': '0.7.0'})
    with pytest.raises(ImportError) as error:
        check_requirements()
    assert all(name in str(error.value) for name in REQUIREMENTS)


def test_packages_and_requirements_of_setup(tmp_path):
    subprocess.run(
        [sys.executable, 'setup.py', '-q', 'egg_info', '--egg-base', str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    info = metadata.PathDistribution(tmp_path / 'mmadvmoe.egg-info')
    scope = {}
    exec((ROOT / 'mmadvmoe' / 'version.py').read_text(), scope)
    assert (info.metadata['Name'], info.version) == ('mmadvmoe', scope['__version__'])
    assert info.metadata['License'] == 'Apache-2.0'

    needed = [Requirement(line) for line in info.requires]
    always = {each.name: each.specifier for each in needed if each.marker is None}
    # Either would overwrite the files of the other.
    assert not {'mmcv', 'mmcv-lite', 'mmcv-full'} & set(always)
    assert all(always.values()), 'every requirement has a version floor'
    for module in ('mmengine', 'mmpretrain'):
        assert str(always[module]) == str(Requirement(module + REQUIREMENTS[module][1]).specifier)
    assert {'docs', 'export', 'interop', 'lite', 'tests'} == set(info.metadata.get_all('Provides-Extra'))
    for each in needed:
        if each.marker is None or each.marker.evaluate({'extra': 'tests'}):
            assert each.specifier.contains(metadata.version(each.name)), each


def test_every_folder_with_modules_is_installed():
    folders = {str(file.parent.relative_to(ROOT)).replace('/', '.') for file in (ROOT / 'mmadvmoe').rglob('*.py')}
    assert folders == set(find_packages(str(ROOT), include=['mmadvmoe', 'mmadvmoe.*']))
