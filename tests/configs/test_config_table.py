"""configs/README.md says what the configs give."""

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = {
    path.relative_to(ROOT / 'configs').as_posix()
    for path in (ROOT / 'configs').rglob('*.py')
    if '_base_' not in path.parts
}


def test_tables_are_those_of_the_configs() -> None:
    text = (ROOT / 'configs' / 'README.md').read_text(encoding='utf-8')
    tool = runpy.run_path(str(ROOT / 'tools' / 'analysis_tools' / 'config_table.py'))
    committed = text.split(tool['BEGIN'])[1].split(tool['END'])[0].strip()
    advice = 'run: python tools/analysis_tools/config_table.py'
    assert FILES == set(re.findall(r'\]\(([^)]+\.py)\)', committed)), advice
    assert committed == tool['tables'](), advice
    savings = [float(number) for number in re.findall(r'\| ([\d.]+)% \|', committed)]
    assert len(savings) == 16 and min(savings) > 50
