"""Tools of an installation by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mmadvmoe import tools
from mmadvmoe.runtime.zoo import read_zoo


def test_tools_run_away_from_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', [*sys.path])
    monkeypatch.setattr(sys, 'argv', ['tools', 'get_flops', 'at_sdense_resnet18_digits.py'])
    tools.main()
    assert '177' in capsys.readouterr().out


def test_configs_and_weights_go_by_name_and_files_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model = read_zoo()['at_sdense_resnet18_digits']
    weights = Path(model.weights).name
    tool = tmp_path / 'show.py'
    tool.write_text('import sys\nprint(*sys.argv[1:], sep="\\n")')
    monkeypatch.setattr(tools, 'tool_files', lambda: {'show': tool})
    monkeypatch.setattr(sys, 'path', [*sys.path])
    monkeypatch.chdir(tmp_path)
    words = [model.name, f'{model.name}.py', weights, '--model', model.name, '--out', 'other.pth']
    for expected in ([str(model.config), str(model.config), model.weights], [str(model.config), *words[1:3]]):
        monkeypatch.setattr(sys, 'argv', ['tools', 'show', *words])
        tools.main()
        assert capsys.readouterr().out.splitlines() == [*expected, *words[3:]]
        # One's own files come first.
        for name in words[1:3]:
            (tmp_path / name).touch()


def test_an_unknown_tool_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, 'argv', ['tools', 'tran'])
    with pytest.raises(SystemExit, match=r"TOOL='tran' is unknown \(did you mean 'train'\?\)"):
        tools.main()
    monkeypatch.setattr(sys, 'argv', ['tools'])
    with pytest.raises(SystemExit, match='usage: .*\n\ntools: .*test, .*train'):
        tools.main()
