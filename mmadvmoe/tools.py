"""The command line tools of an installation: ``python -m mmadvmoe.tools train advmoe_resnet18_digits.py``.

A config can be named as in the model index, with or without ``.py`` (right behind an option with it), and weights that
come along by their file name; paths are taken as they are.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from mmadvmoe.runtime.zoo import home, read_zoo
from mmadvmoe.utils import choose


def tool_files() -> dict[str, Path]:
    """The tools by name: those of the folder ``tools``, and of the folders in it."""
    files = sorted((home() / 'tools').rglob('*.py'), key=lambda path: len(path.parts), reverse=True)
    return {path.stem: path for path in files}


def main() -> None:
    """Run a tool on the arguments behind its name."""
    tools = tool_files()
    if len(sys.argv) < 2 or sys.argv[1] in ('-h', '--help'):
        sys.exit(f'usage: python -m mmadvmoe.tools TOOL ...\n\ntools: {", ".join(sorted(tools))}')
    try:
        path = tools[choose(sys.argv[1], sorted(tools), 'TOOL')]
    except ValueError as error:
        sys.exit(str(error))
    files = _files_by_name()
    # A bare name behind an option is a label or a folder.
    words = [
        word if Path(word).exists() or (before.startswith('-') and not Path(word).suffix) else files.get(word, word)
        for before, word in zip(sys.argv[1:], sys.argv[2:])
    ]
    sys.argv = [str(path), *words]
    # As Python does for a script: its neighbours can be imported.
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name='__main__')


def _files_by_name() -> dict[str, str]:
    """Configs by the names of their models, with and without ``.py``, and weights by the names of their files."""
    files = {}
    for name, model in read_zoo().items():
        files[name] = files[f'{name}.py'] = str(model.config)
        if model.weights is not None:
            files[Path(model.weights).name] = model.weights
    return files


if __name__ == '__main__':
    main()
