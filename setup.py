import os
import shutil
from pathlib import Path
from runpy import run_path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
#: What OpenMMLab's MIM and ModelHub look for in the folder .mim of an installed package.
MIM_FILES = ('configs', 'tools', 'zoo', 'model-index.yml')


class BuildWithMim(build_py):
    """Put configs, tools, weights and model index into the package: copies, or links for an editable installation.

    Windows lets few users make links.
    """

    def run(self) -> None:
        super().run()
        package = ROOT if self.editable_mode else Path(self.build_lib).resolve()
        folder = package / 'mmadvmoe' / '.mim'
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in MIM_FILES:
            source = ROOT / name
            if self.editable_mode and os.name == 'posix':
                (folder / name).symlink_to(source, target_is_directory=source.is_dir())
            elif source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns('__pycache__'))
            else:
                shutil.copy(source, folder)


def openmmlab(module: str, distribution: str = '') -> str:
    """The requirement on an OpenMMLab package, in the range that the import checks as well."""
    _, allowed = run_path(str(ROOT / 'mmadvmoe' / '_requirements.py'))['REQUIREMENTS'][module]
    return (distribution or module) + allowed


#: Libraries whose attacks run on what `load_robust_model` gives.
INTEROP = ['foolbox>=3.3', 'adversarial-robustness-toolbox>=1.17']

#: What tools/export.py needs for ONNX.
EXPORT = ['onnx>=1.16', 'onnxruntime>=1.18', 'onnxscript>=0.3']

setup(
    name='mmadvmoe',
    version=run_path(str(ROOT / 'mmadvmoe' / 'version.py'))['__version__'],
    description='Adversarial training of mixture-of-experts networks, a plugin for MMPretrain',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    keywords='adversarial robustness, mixture of experts, image classification, OpenMMLab',
    packages=find_packages(include=['mmadvmoe', 'mmadvmoe.*']),
    cmdclass={'build_py': BuildWithMim},
    package_data={'mmadvmoe.report': ['*.jinja']},
    python_requires='>=3.10',
    install_requires=[
        # Neither mmcv nor mmcv-lite stands here. Both provide the module `mmcv` and overwrite each
        # other's files, so a requirement on either would damage an installation of the other; and
        # mmcv has no wheel for current PyTorch versions and does not build with current
        # setuptools. Whoever has none asks for the extra `lite`; the import checks what is there.
        openmmlab('mmengine'),
        openmmlab('mmpretrain'),
        # The first version that loads with weights_only=True by default and lets a reader name
        # the few further globals a checkpoint of MMEngine needs.
        'torch>=2.6.0',
        'torchvision>=0.21.0',
        'torchattacks>=3.5.1',
        # AutoAttack by its authors.
        'pyautoattack>=0.2.0',
        # The first version with numpy.dtypes, whose classes are such globals.
        'numpy>=1.25.0',
        'scikit-learn>=1.2.0',
        'scipy>=1.13.0',
        'matplotlib>=3.6.0',
        'pillow>=9.0.0',
        'jinja2>=3.0.0',
        'packaging>=21.0',
        'pyyaml>=5.4',
        'tqdm>=4.60.0',
    ],
    extras_require={
        'lite': [openmmlab('mmcv', 'mmcv-lite')],
        # Ruff is held to one minor version: the next may format differently. From 70.1 on, setuptools builds wheels.
        'interop': INTEROP,
        'export': EXPORT,
        # Not sphinx>=8, which needs a newer requests than torchattacks takes.
        'docs': ['sphinx>=7.2', 'myst-nb>=1.4', 'furo>=2024.8', 'ipykernel>=6.29'],
        'tests': [
            *INTEROP,
            *EXPORT,
            'pytest>=7.4',
            'pytest-xdist>=3.5',
            'ruff>=0.17.0,<0.18.0',
            'setuptools>=70.1',
            'tensorboard>=2.14',
        ],
    },
    classifiers=[
        'Intended Audience :: Science/Research',
        'Operating System :: OS Independent',
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)
