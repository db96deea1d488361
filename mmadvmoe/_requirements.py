"""Which OpenMMLab packages this one works with, and a readable refusal of any other.

This module imports nothing heavy: ``setup.py`` reads the ranges from it, and ``mmadvmoe`` checks them before MMEngine
or MMPretrain are imported, whose own failures name neither cause nor cure.
"""

from importlib import metadata

# Module: (the distributions that provide it, the versions allowed).
# - mmcv: what MMPretrain 1.2 accepts. mmcv-lite is the same module without compiled ops, and no
#   component of this package calls one.
# - mmengine: 0.10.7 is the only release the checkpoint and resume code is tested against.
# - mmpretrain: releases before 1.2 refuse mmcv 2.2.
REQUIREMENTS: dict[str, tuple[tuple[str, ...], str]] = {
    'mmcv': (('mmcv', 'mmcv-lite', 'mmcv-full'), '>=2.0.0,<2.4.0'),
    'mmengine': (('mmengine', 'mmengine-lite'), '>=0.10.7,<0.11.0'),
    'mmpretrain': (('mmpretrain',), '>=1.2.0,<2.0.0'),
}


def check_requirements() -> None:
    """Check that mmcv, mmengine and mmpretrain are installed in versions that work.

    Only the metadata of the installed distributions is read; none of them is imported.

    Raises:
        ImportError: One is missing, too old or too new. The message names every such package, the version found, the
            versions allowed and the command that installs one of them.
    """
    problems = [
        problem
        for module, (distributions, allowed) in REQUIREMENTS.items()
        for problem in _problems(module, distributions, allowed)
    ]
    if problems:
        raise ImportError('mmadvmoe cannot be imported:\n' + '\n'.join(problems))


def _problems(module: str, distributions: tuple[str, ...], allowed: str) -> list[str]:
    # A dependency of mmcv, so possibly missing together with it: not imported on top.
    from packaging.specifiers import SpecifierSet

    found = {name: version for name in distributions if (version := _version(name)) is not None}
    if not found:
        return [f'- {module} is not installed; {module}{allowed} is needed. {_cure(module, allowed)}']
    # Every distribution found is judged: two that provide one module overwrite each other's files.
    return [
        f'- {name} {version} is installed, but {module}{allowed} is needed. {_cure(module, allowed, remove=name)}'
        for name, version in found.items()
        if not SpecifierSet(allowed).contains(version, prereleases=True)
    ]


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cure(module: str, allowed: str, remove: str | None = None) -> str:
    install = f'pip install "{module}{allowed}"'
    if module != 'mmcv':
        return f'Run: {install}'
    lite = f'pip install "mmcv-lite{allowed}"'
    if remove not in (None, 'mmcv-lite'):
        lite = f'pip uninstall -y {remove} && {lite}'
    return (
        f'Run: {lite} (mmcv-lite is enough, as no compiled op is used; a full mmcv of an allowed version serves as '
        'well)'
    )
