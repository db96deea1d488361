"""Tests of this folder are marked ``gpu``; ``pytest tests/gpu --device cpu`` checks the tests themselves."""

import os
from pathlib import Path

import pytest
import torch

# Read when the library is loaded; without it no product is deterministic.
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


def _set_tf32(on):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on


@pytest.fixture(autouse=True)
def _full_precision(device):
    """Products in float32 as on the CPU, without TF32."""
    before = torch.backends.cudnn.allow_tf32
    _set_tf32(False)
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, before


@pytest.fixture
def tf32():
    """TF32 from now to the end of the test."""
    return lambda: _set_tf32(True)


@pytest.fixture
def no_waiting(device):
    """A context in which the host never waits for the device."""
    if device.type == 'cuda':
        return _SyncDebugMode('error')
    from host_reads import HostReads

    class NoReads(HostReads):
        def __exit__(self, *error):
            super().__exit__(*error)
            assert error[0] or not self.names, self.names

    return NoReads()


class _SyncDebugMode:
    def __init__(self, mode):
        self.mode = mode

    def __enter__(self):
        torch.cuda.synchronize()
        self.before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode(self.mode)

    def __exit__(self, *error):
        torch.cuda.set_sync_debug_mode(self.before)
