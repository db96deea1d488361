"""Exported models compute what the model does, ONNX Runtime being the judge of ONNX."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from small_mixtures import random_mixture

ROOT = Path(__file__).resolve().parents[2]
CONFIG = 'configs/advmoe_resnet18_digits.py'


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    return import_module('export')


# What ONNX gets is an exported program, so that one of those by itself is enough.
@pytest.mark.parametrize(
    ('kind', 'routing'),
    [
        *(('torchscript', routing) for routing in ('image', 'layer', 'token')),
        ('torch_export', 'layer'),
        ('onnx', 'image'),
        ('onnx', 'token'),
    ],
)
def test_batches_of_mixed_routes_are_computed_as_by_the_model(
    export: ModuleType, kind: str, routing: str, tmp_path: Path
) -> None:
    if kind == 'onnx':
        pytest.importorskip('onnxruntime')
    torch.manual_seed(0)
    model = random_mixture(routing, num_experts=2).model
    images = torch.rand(64, 3, 8, 8)
    exported = export.export(model, images[:2], kind, tmp_path / f'model{export.SUFFIXES[kind]}')
    assert export.compare(model, exported, images) <= export.TOLERANCE
    assert all(min(routing.counts) > 0 for routing in model.decide_routes(images))
    # Images of another batch do not change what comes of one.
    assert export.compare(model, exported, images.flip(0)) <= export.TOLERANCE


def test_the_table_names_routes_and_differences(
    export: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    table = import_module('export_table')
    name = 'advmoe_resnet18_digits'
    monkeypatch.setattr('sys.argv', ['export_table.py', name, '--formats', 'torchscript'])
    table.main()
    row = capsys.readouterr().out.splitlines()[-1]
    _, model, routing, loads, difference, _ = (cell.strip() for cell in row.split('|'))
    assert (model, routing) == (f'`{name}`', 'image')
    assert min(map(int, loads.split('/'))) > 0 and sum(map(int, loads.split('/'))) == 64
    assert float(difference) <= export.TOLERANCE


def test_the_checkpoint_itself_is_not_overwritten(
    export: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    checkpoint = tmp_path / 'best.pt'
    checkpoint.write_bytes(b'weights')
    monkeypatch.setattr('sys.argv', ['export.py', str(ROOT / CONFIG), str(checkpoint), '--format', 'torchscript'])
    monkeypatch.setattr(export, 'load_robust_model', lambda *_: None)
    with pytest.raises(SystemExit, match='best.pt is the checkpoint itself: give another file with --out'):
        export.main()
    assert checkpoint.read_bytes() == b'weights'
