"""Tools of an installation by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mmadvmoe import tools


def test_tools_run_away_from_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', [*sys.path])
    monkeypatch.setattr(sys, 'argv', ['tools', 'get_flops', 'at_sdense_resnet18_digits.py'])
    tools.main()
    assert '177' in capsys.readouterr().out


def test_an_unknown_tool_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, 'argv', ['tools', 'tran'])
    with pytest.raises(SystemExit, match=r"TOOL='tran' is unknown \(did you mean 'train'\?\)"):
        tools.main()
    monkeypatch.setattr(sys, 'argv', ['tools'])
    with pytest.raises(SystemExit, match='usage: .*\n\ntools: .*test, .*train'):
        tools.main()
