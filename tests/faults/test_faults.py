"""The short form of ``tools/fault_suite.py``."""

from pathlib import Path

import pytest
import torch
from fault_cases import FAULTS


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize('name', [name for name, fault in FAULTS.items() if fault.tested])
def test_nothing_is_lost_or_believed(name: str, tmp_path: Path) -> None:
    for number in FAULTS[name].tested:
        folder = tmp_path / str(number)
        folder.mkdir()
        assert FAULTS[name].run(folder, number)
