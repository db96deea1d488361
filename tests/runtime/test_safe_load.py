"""Checkpoints load without running what is in them, and a bad file says what is wrong with it."""

import functools
import http.server
import io
import os
import pickle
import threading
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from malicious_files import Call, PythonPickle, malicious
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.model import BaseModule, Sequential
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmengine.runner import load_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader
from torch import nn

from mmadvmoe.runtime.safe_load import (
    CheckpointError,
    check_state_dict,
    enable_safe_loading,
    load_from_local,
)

enable_safe_loading()


@pytest.fixture
def checkpoint():
    """As OpenMMLab publishes them: weights, meta, and MMEngine's message hub."""
    hub = MessageHub('hub')
    for step in range(5):
        hub.update_scalar('train/loss', 1.0 / (step + 1), 16)
        hub.update_scalar('val/accuracy/top1', np.float32(step).item())
    hub.update_info('best_score', np.float64(71.5))
    hub.update_info('dataset_meta', {'classes': ('cat', 'dog'), 'palette': np.arange(6)})
    meta = dict(epoch=3, iter=9, seed=7, cfg='model = dict()', dataset_meta={'classes': ['cat']})
    state_dict = OrderedDict(weight=torch.arange(6.0).view(2, 3), bias=torch.ones(2))
    return dict(meta=meta, state_dict=state_dict, message_hub=hub.state_dict())


def save_as_old_numpy(checkpoint, path):
    """Write a checkpoint whose arrays are named by the place they had before NumPy 2."""
    new = io.BytesIO()
    torch.save(checkpoint, new)
    with zipfile.ZipFile(new) as source, zipfile.ZipFile(path, 'w') as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith('data.pkl'):
                assert b'numpy._core.multiarray' in data
                data = data.replace(b'numpy._core.multiarray', b'numpy.core.multiarray')
            target.writestr(name, data)


@pytest.mark.parametrize('save', [torch.save, save_as_old_numpy], ids=['numpy2', 'numpy1'])
def test_mmengine_checkpoint_loads_whole(checkpoint, save, tmp_path):
    path = str(tmp_path / 'epoch_3.pth')
    save(checkpoint, path)
    loaded = CheckpointLoader.load_checkpoint(path, 'cpu')
    assert loaded['meta'] == checkpoint['meta']
    assert torch.equal(loaded['state_dict']['weight'], checkpoint['state_dict']['weight'])
    scalars = loaded['message_hub']['log_scalars']
    expected = checkpoint['message_hub']['log_scalars']['train/loss']
    for got, wanted in zip(scalars['train/loss'].data, expected.data):
        np.testing.assert_array_equal(got, wanted)
        assert got.dtype == wanted.dtype
    assert scalars['train/loss'].statistics('mean') == expected.mean()
    assert scalars['val/accuracy/top1'].current() == 4.0
    info = loaded['message_hub']['runtime_info']
    assert info['best_score'] == 71.5
    np.testing.assert_array_equal(info['dataset_meta']['palette'], np.arange(6))


def test_legacy_format_and_bare_state_dict_load(checkpoint, tmp_path):
    path = str(tmp_path / 'resnet18.pth')
    torch.save(checkpoint['state_dict'], path, _use_new_zipfile_serialization=False)
    assert torch.equal(load_from_local(path)['bias'], torch.ones(2))


@pytest.mark.parametrize('attack', malicious('x'))
@pytest.mark.parametrize('place', ['meta', 'message_hub', 'state_dict'])
def test_malicious_file_is_refused_unexecuted(checkpoint, attack, place, tmp_path):
    marker, path = tmp_path / 'executed', str(tmp_path / 'evil.pth')
    checkpoint[place]['payload'] = malicious(marker)[attack]
    torch.save(checkpoint, path, pickle_module=PythonPickle)
    with pytest.raises(CheckpointError, match='refused: it asks for .*executed') as caught:
        load_checkpoint(nn.Linear(3, 2), path)
    assert path in str(caught.value)
    assert not marker.exists()


def test_file_cannot_set_fields_of_a_number_type(tmp_path):
    """A dtype whose fields a file sets would let it take numbers for pointers to objects."""
    path = str(tmp_path / 'fields.pth')
    pickled = (
        b'\x80\x02}(X\x05\x00\x00\x00dtypecnumpy\ndtype\n(X\x02\x00\x00\x00f8K\x00K\x01tR'
        b'(K\x03X\x01\x00\x00\x00<N(X\x01\x00\x00\x00at}X\x01\x00\x00\x00aK\x00sK\x08K\x08K\x3ftb'
        b'u.'
    )
    assert pickle.loads(pickled)['dtype'].fields is not None
    template = io.BytesIO()
    torch.save(dict(weight=torch.ones(1)), template)
    with zipfile.ZipFile(template) as source, zipfile.ZipFile(path, 'w') as target:
        for name in source.namelist():
            target.writestr(name, pickled if name.endswith('data.pkl') else source.read(name))
    assert torch.load(path, weights_only=True)['dtype'] is np.dtype('f8')
    assert np.dtype('f8').fields is None and not np.dtype('f8').hasobject


def test_file_cannot_replace_the_statistics_of_history_buffers(checkpoint, tmp_path):
    path = str(tmp_path / 'poisoned.pth')
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(HistoryBuffer._statistics_methods, 'mean', HistoryBuffer.max)
        torch.save(checkpoint, path)
    loaded = load_from_local(path)['message_hub']['log_scalars']['train/loss']
    assert loaded.statistics('mean') == pytest.approx(loaded.mean())
    assert HistoryBuffer([1.0, 3.0], [1, 1]).statistics('mean') == 2.0


def foreign_files(checkpoint, path):
    """Files that are no checkpoint, and what the message must say of each."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    whole = buffer.getvalue()
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, 'w') as archive:
        archive.writestr('readme.txt', 'hello')
    buffer = io.BytesIO()
    torch.save(dict(meta=checkpoint['meta'], state_dict={}), buffer)
    no_weights = buffer.getvalue()
    buffer = io.BytesIO()
    torch.save([torch.ones(1)], buffer)
    a_list = buffer.getvalue()
    buffer = io.BytesIO()
    torch.save(dict(state_dict=[1, 2]), buffer)
    bad_state_dict = buffer.getvalue()
    flipped = bytearray(whole)
    flipped[200] ^= 0xFF
    return {
        'empty': (b'', 'is empty'),
        'text': (b'not a checkpoint at all\n', 'not a checkpoint'),
        'zip': (zipped.getvalue(), 'readme.txt'),
        'pickle of a list': (pickle.dumps([1, 2], protocol=2), 'damaged or was not written'),
        'list': (a_list, 'holds a list'),
        'cut in the middle': (whole[: len(whole) // 2], 'cut off'),
        'cut by a byte': (whole[:-1], 'cut off'),
        'legacy, cut': (b'\x80\x02}q', 'damaged'),
        'damaged pickle': (bytes(flipped), 'damaged'),
        'no weights': (no_weights, 'holds no weights'),
        'state_dict of the wrong type': (bad_state_dict, 'does not map names to tensors'),
    }


@pytest.mark.parametrize('kind', foreign_files(dict(meta={}, state_dict={'w': torch.ones(9)}), ''))
def test_foreign_file_says_what_is_wrong(checkpoint, kind, tmp_path):
    path = tmp_path / 'bad.pth'
    content, message = foreign_files(checkpoint, path)[kind]
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_from_local(str(path))
    assert str(path) in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match='no checkpoint .*epoch_9.pth'):
        load_from_local(str(tmp_path / 'epoch_9.pth'))
    with pytest.raises(CheckpointError, match='is not a file'):
        load_from_local(str(tmp_path))


def test_pretrained_init_goes_through_the_safe_loader(tmp_path):
    path, marker = str(tmp_path / 'w.pth'), tmp_path / 'executed'
    torch.save(dict(state_dict={'0.weight': torch.full((2, 3), 5.0)}), path)
    init_cfg = dict(type='Pretrained', checkpoint=path)
    model = Sequential(nn.Linear(3, 2), init_cfg=init_cfg)
    model.init_weights()
    assert torch.equal(model[0].weight, torch.full((2, 3), 5.0))

    torch.save(dict(state_dict={'x': Call(os.system, f'touch {marker}')}), path)
    with pytest.raises(CheckpointError, match='refused'):
        BaseModule(init_cfg=init_cfg).init_weights()
    assert not marker.exists()


def test_url_is_loaded_safely(checkpoint, tmp_path, monkeypatch):
    """torch.hub, which MMEngine asks for URLs, unpickles whatever a file asks for."""
    served, marker = tmp_path / 'served', tmp_path / 'executed'
    served.mkdir()
    torch.save(checkpoint, served / 'good.pth')
    torch.save(dict(state_dict={'x': Call(os.system, f'touch {marker}')}), served / 'evil.pth')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    monkeypatch.setenv('MMENGINE_HOME', str(tmp_path / 'home'))
    monkeypatch.setenv('no_proxy', '*')
    handler = functools.partial(_QuietHandler, directory=str(served))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f'http://127.0.0.1:{server.server_port}'
        loaded = CheckpointLoader.load_checkpoint(f'{url}/good.pth', map_location='cpu')
        assert torch.equal(loaded['state_dict']['bias'], torch.ones(2))
        # Files of one name at other addresses are other files.
        (served / 'run').mkdir()
        torch.save(dict(state_dict=dict(bias=torch.zeros(2))), served / 'run' / 'good.pth')
        other = CheckpointLoader.load_checkpoint(f'{url}/run/good.pth', map_location='cpu')
        assert torch.equal(other['state_dict']['bias'], torch.zeros(2))
        with pytest.raises(CheckpointError, match='refused'):
            CheckpointLoader.load_checkpoint(f'{url}/evil.pth')
        with pytest.raises(OSError, match=r'/gone\.pth could not be downloaded: .*404'):
            CheckpointLoader.load_checkpoint(f'{url}/gone.pth')
        zoo = {'good': f'{url}/good.pth', 'evil': f'{url}/evil.pth', 'file': str(served / 'good.pth')}
        for lookup in ('get_torchvision_models', 'get_external_models', 'get_mmcls_models'):
            monkeypatch.setattr(mmengine_checkpoint, lookup, lambda: zoo)
        for scheme in ('torchvision', 'modelzoo', 'open-mmlab', 'openmmlab', 'mmcls'):
            loaded = CheckpointLoader.load_checkpoint(f'{scheme}://good', map_location='cpu')
            assert ('bias' in loaded['state_dict']) == (scheme != 'mmcls'), 'of mmcls, the backbone alone'
            with pytest.raises(CheckpointError, match='refused'):
                CheckpointLoader.load_checkpoint(f'{scheme}://evil')
        assert 'bias' in CheckpointLoader.load_checkpoint('open-mmlab://file')['state_dict']
        server.shutdown()
    assert not marker.exists()


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_check_state_dict_names_what_does_not_fit():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    state_dict = model.state_dict()
    check_state_dict(model, dict(state_dict=state_dict), 'a.pth')
    wrapped = {f'module.{name}': value for name, value in state_dict.items()}
    del wrapped['module.1.num_batches_tracked']
    check_state_dict(model, dict(state_dict=wrapped), 'a.pth')

    bad = dict(state_dict)
    del bad['0.bias']
    bad['router.weight'] = torch.ones(1)
    bad['1.weight'] = torch.ones(7)
    with pytest.raises(CheckpointError) as caught:
        check_state_dict(model, dict(state_dict=bad), 'work_dirs/a.pth')
    message = str(caught.value)
    for part in ('work_dirs/a.pth', 'missing 0.bias', 'unexpected router.weight', '1.weight (7,)'):
        assert part in message
    with pytest.raises(CheckpointError, match='no `state_dict`, only model'):
        check_state_dict(model, dict(model=state_dict), 'a.pth')


def test_check_state_dict_lets_load_hooks_convert():
    class Resizing(nn.Module):
        def __init__(self):
            super().__init__()
            self.position = nn.Parameter(torch.zeros(4))
            self.register_load_state_dict_pre_hook(self.resize)

        @staticmethod
        def resize(module, state_dict, prefix, *args):
            state_dict[prefix + 'position'] = state_dict[prefix + 'position'].repeat(2)

    check_state_dict(Resizing(), dict(state_dict={'position': torch.ones(2)}), 'a.pth')
