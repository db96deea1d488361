"""What an installation brings beside the package: configs, tools and model index, where OpenMMLab looks for them."""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ('setup.py', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE', 'model-index.yml')
FOLDERS = ('mmadvmoe', 'configs', 'tools', 'zoo')


@pytest.fixture(scope='module')
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, because building leaves files behind."""
    folder = tmp_path_factory.mktemp('checkout')
    for name in SOURCES:
        shutil.copy(ROOT / name, folder)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns('__pycache__', '.mim'))
    return folder


def _files(*folders: str) -> set[str]:
    """The files of the repository below these folders that are no leftovers of running it."""
    paths = [path for folder in folders for path in (ROOT / folder).rglob('*')]
    hidden = ('__pycache__', '.mim')
    return {path.relative_to(ROOT).as_posix() for path in paths if path.is_file() and not set(hidden) & set(path.parts)}


def _run(*command: str, cwd: Path) -> None:
    done = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_wheel_holds_configs_tools_and_index(checkout: Path, tmp_path: Path) -> None:
    options = ('--no-deps', '--no-build-isolation', '--disable-pip-version-check', '--wheel-dir', str(tmp_path))
    _run('-m', 'pip', 'wheel', *options, str(checkout), cwd=tmp_path)
    (wheel,) = tmp_path.glob('mmadvmoe-*.whl')
    with ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if '.dist-info/' not in name}
        mim = {f'mmadvmoe/.mim/{name}' for name in {'model-index.yml', *_files('configs', 'tools', 'zoo')}}
        assert names == mim | _files('mmadvmoe')
        index = archive.read('mmadvmoe/.mim/model-index.yml')
        assert index == (ROOT / 'model-index.yml').read_bytes()


def test_a_source_distribution_builds_the_same(checkout: Path, tmp_path: Path) -> None:
    _run('setup.py', '-q', 'sdist', '--dist-dir', str(tmp_path), cwd=checkout)
    (archive,) = tmp_path.glob('mmadvmoe-*.tar.gz')
    with tarfile.open(archive) as tar:
        names = {name.split('/', 1)[1] for name in tar.getnames() if '/' in name}
    assert {*SOURCES, *_files(*FOLDERS)} <= names


def test_an_editable_installation_links_to_the_checkout(checkout: Path) -> None:
    """As ``pip install -e`` runs it; nothing is installed here."""
    _run('setup.py', '-q', 'editable_wheel', '--dist-dir', 'editable', cwd=checkout)
    folder = checkout / 'mmadvmoe' / '.mim'
    assert sorted(path.name for path in folder.iterdir()) == ['configs', 'model-index.yml', 'tools', 'zoo']
    assert (folder / 'configs' / 'advmoe_resnet18_digits.py').samefile(checkout / 'configs/advmoe_resnet18_digits.py')
