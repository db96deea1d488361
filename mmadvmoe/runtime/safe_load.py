"""Loading checkpoints without running what is in them.

A pickle can call any function when it is read. PyTorch's ``weights_only=True`` calls none but those on a list, and
MMEngine's own checkpoints need a few that are not on it: its :class:`~mmengine.logging.HistoryBuffer`, and NumPy arrays
of numbers. They are added here in the narrowest form that loads such a checkpoint, and MMEngine's
:class:`~mmengine.runner.CheckpointLoader` gets loaders that go through one function.
"""

from __future__ import annotations

import hashlib
import io
import os
import os.path as osp
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from mmengine.runner import checkpoint as model_zoos
from torch import nn

from mmadvmoe.utils import bare_model, some

from .files import damage_of, in_first_process

try:
    from numpy._core import multiarray as numpy_core
except ImportError:  # NumPy 1.25
    from numpy.core import multiarray as numpy_core

MapLocation = str | torch.device | Callable | None

_STATISTICS = ('min', 'max', 'current', 'mean')
_NUMBER_KINDS = 'biufc'
_ADVICE = 'Copy or download it again, or resume from an earlier checkpoint with `--resume <work_dir>/epoch_<n>.pth`.'


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; says which file, what is wrong with it and what to do."""


def enable_safe_loading() -> None:
    """Make MMEngine load its own and OpenMMLab's checkpoints with ``weights_only=True``.

    ``Runner.resume``, ``Runner.load_checkpoint``, ``init_cfg=dict(type='Pretrained')`` and
    ``mmengine.runner.load_checkpoint`` read local files, URLs and model zoos by :func:`load_from_local` from then on:
    MMEngine's own loader of URLs unpickles what a file asks for. Calling it again changes nothing.
    """
    torch.serialization.add_safe_globals(_safe_globals())
    for prefixes, loader in (
        ('', load_from_local),
        (('http://', 'https://'), load_from_http),
        (('torchvision://', 'modelzoo://'), load_from_torchvision),
        (('open-mmlab://', 'openmmlab://'), load_from_openmmlab),
        ('mmcls://', load_from_mmcls),
    ):
        CheckpointLoader.register_scheme(prefixes, loader, force=True)


def load_from_local(filename: str, map_location: MapLocation = None) -> dict:
    """Load a checkpoint, MMEngine's or a bare state dict as torchvision publishes it, with ``weights_only=True``.

    ``~`` in the filename is expanded.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is empty, cut off, not a checkpoint, holds no weights, has bytes that are not those
            of its checksum (the SHA-256 at its end, or the CRC-32 of each record), or holds objects that a checkpoint
            does not need. Nothing of such an object is executed.
    """
    filename = osp.expanduser(os.fspath(filename))
    if not osp.exists(filename):
        raise FileNotFoundError(
            f'There is no checkpoint {filename!r}. Check `load_from`, `init_cfg.checkpoint` or the path on the command '
            'line.'
        )
    _check_container(filename)
    # A buffer that is loaded merges its methods into those of its class. A file has no say there.
    HistoryBuffer()
    methods = dict(HistoryBuffer._statistics_methods)
    try:
        checkpoint = torch.load(filename, map_location=map_location, weights_only=True)
    except (OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise _explain(filename, error) from error
    finally:
        HistoryBuffer._statistics_methods.clear()
        HistoryBuffer._statistics_methods.update(methods)
    _check_content(filename, checkpoint)
    return checkpoint


def load_from_http(url: str, map_location: MapLocation = None) -> dict:
    """Download a checkpoint into PyTorch's cache, unless it is there, and load it as :func:`load_from_local` does."""
    name = osp.basename(urlparse(url).path)
    # A name that ends in a date or in no hash does not tell the content, which that at another address can differ in.
    if not re.search(r'-(?!20\d{6}\.)[0-9a-f]{8,}\.\w+$', name):
        name = f'{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}'
    filename = osp.join(torch.hub.get_dir(), 'checkpoints', name)

    def fetch() -> None:
        if osp.exists(filename):
            return
        os.makedirs(osp.dirname(filename), exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, filename, progress=sys.stderr.isatty())
        except OSError as error:  # an HTTPError cannot be sent to the other processes
            raise OSError(f'{url} could not be downloaded: {error}') from error

    in_first_process(fetch)
    # On another machine it is still not there after that.
    fetch()
    return load_from_local(filename, map_location)


def load_from_torchvision(name: str, map_location: MapLocation = None) -> dict:
    """Load ``torchvision://<model>``."""
    return load_from_http(model_zoos.get_torchvision_models()[_after_scheme(name)], map_location)


def load_from_openmmlab(name: str, map_location: MapLocation = None) -> dict:
    """Load ``open-mmlab://<model>``, which may stand for a file in MMEngine's own folder."""
    name = _after_scheme(name)
    source = model_zoos.get_external_models()[model_zoos.get_deprecated_model_names().get(name, name)]
    if '://' in source:
        return load_from_http(source, map_location)
    return load_from_local(osp.join(model_zoos._get_mmengine_home(), source), map_location)


def load_from_mmcls(name: str, map_location: MapLocation = None) -> dict:
    """Load the backbone of ``mmcls://<model>``."""
    checkpoint = load_from_http(model_zoos.get_mmcls_models()[_after_scheme(name)], map_location)
    weights, prefix = checkpoint.get('state_dict', checkpoint), 'backbone.'
    return dict(state_dict={key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)})


def _after_scheme(name: str) -> str:
    return name.split('://', 1)[1]


def check_state_dict(model: nn.Module, checkpoint: Mapping[str, Any], filename: str) -> None:
    """Check that a checkpoint fits a model tensor for tensor.

    MMEngine loads with ``strict=False``: a tensor that does not fit stays as it was initialised, and only the log says
    so. ``num_batches_tracked`` may be missing, as in MMEngine. What the model's own load hooks convert (a position
    embedding of another size, say) fits.

    Raises:
        CheckpointError: If a tensor is missing, unexpected or of another shape; names the first few of each.
    """
    if 'state_dict' not in checkpoint:
        raise CheckpointError(
            f'Checkpoint {filename!r} has no `state_dict`, only {some(checkpoint)}. It is not a checkpoint of '
            'MMEngine; convert it, or load it with `init_cfg=dict(type="Pretrained", checkpoint=...)` of the backbone.'
        )
    model = bare_model(model)
    given = {re.sub(r'^module\.', '', name): value for name, value in checkpoint['state_dict'].items()}
    wanted = model.state_dict()
    missing = [k for k in wanted if k not in given and not k.endswith('num_batches_tracked')]
    unexpected = [name for name in given if name not in wanted]
    shapes = [
        f'{name} {tuple(given[name].shape)} in the file, {tuple(value.shape)} in the model'
        for name, value in wanted.items()
        if name in given and given[name].shape != value.shape
    ]
    problems = {'missing': missing, 'unexpected': unexpected, 'of another shape': shapes}
    problems = [f'{what} {some(names)}' for what, names in problems.items() if names]
    if not problems:
        return
    try:
        model.load_state_dict(given, strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f'Checkpoint {filename!r} does not fit the model. Tensors {"; ".join(problems)}. Use the config that the '
            'checkpoint was trained with. To start training from the tensors that do fit, set `load_from` and '
            '`resume=False`.'
        ) from error


def check_can_be_loaded(state: Any, what: str, cure: str) -> None:
    """Check that what is going to be saved, a small part of a checkpoint, will load; ``what`` names it.

    Raises:
        ValueError: It holds something else than numbers, text and tensors, such as a function.
    """
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    try:
        torch.load(file, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r'GLOBAL (\S+)', str(error))
        held = found[1] if found else 'something that is neither number, text nor tensor'
        raise ValueError(
            f'{what} would be saved with {held}, and no checkpoint with it can be loaded again: {cure}'
        ) from error


def _check_container(filename: str) -> None:
    """Refuse what is visibly no checkpoint, or damaged, without unpickling anything."""
    if not osp.isfile(filename):
        raise CheckpointError(f'{filename!r} is not a file. Name the checkpoint inside it.')
    with open(filename, 'rb') as file:
        magic = file.read(4)
    if not magic:
        raise CheckpointError(f'Checkpoint {filename!r} is empty. {_ADVICE}')
    damage = damage_of(filename)
    if damage is not None:
        raise CheckpointError(f'Checkpoint {filename!r} is damaged: {damage}. {_ADVICE}')
    if zipfile.is_zipfile(filename):
        with zipfile.ZipFile(filename) as archive:
            names = archive.namelist()
        if not any(name.endswith('/data.pkl') for name in names):
            raise CheckpointError(f'{filename!r} is a zip file but not a checkpoint: it holds {some(names)}.')
    elif magic == b'PK\x03\x04':
        raise CheckpointError(f'Checkpoint {filename!r} is cut off: its end is missing. {_ADVICE}')
    elif magic[:1] != b'\x80':
        raise CheckpointError(f'{filename!r} is not a checkpoint: it is neither of the formats that PyTorch writes.')


def _check_content(filename: str, checkpoint: Any) -> None:
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(
            f'{filename!r} is not a checkpoint: it holds a {type(checkpoint).__name__}, not a dict with a `state_dict`.'
        )
    # Weights of other libraries may lie under another name ("model") or bare at the top.
    weights = checkpoint.get('state_dict', checkpoint)
    if not isinstance(weights, Mapping) or not all(isinstance(name, str) for name in weights):
        raise CheckpointError(f'The `state_dict` of {filename!r} does not map names to tensors. {_ADVICE}')
    nested = [value for value in weights.values() if isinstance(value, Mapping)]
    if not any(isinstance(v, torch.Tensor) for group in (weights, *nested) for v in group.values()):
        raise CheckpointError(
            f'{filename!r} holds no weights: no `state_dict`, only {some(checkpoint)}. Choose a file that a training '
            'run has saved, such as `epoch_*.pth`.'
        )


def _explain(filename: str, error: Exception) -> CheckpointError:
    # Before that mark, PyTorch's message recommends to load without safety.
    text = str(error).split('WeightsUnpickler error:')[-1].strip()
    refused = re.search(r'GLOBAL (\S+)|recognized function (.+)|Refused (.+)|but got (.+)', text)
    if isinstance(error, pickle.UnpicklingError) and refused:
        culprit = next(group for group in refused.groups() if group)
        return CheckpointError(
            f'Checkpoint {filename!r} was refused: it asks for {culprit}, which no checkpoint needs and which could '
            'run foreign code. Nothing of it was executed. If you trust the file and know why it holds that object, '
            'allow it by `torch.serialization.add_safe_globals`.'
        )
    first_line = text.splitlines()[0] if text else type(error).__name__
    return CheckpointError(f'Checkpoint {filename!r} is damaged or was not written by PyTorch: {first_line} {_ADVICE}')


def _safe_globals() -> list:
    """The parts of a checkpoint of MMEngine that are neither tensors nor plain Python values."""
    dtypes = [np.dtype(code) for code in np.typecodes['All']]
    numbers = {type(dtype) for dtype in dtypes if dtype.kind in _NUMBER_KINDS}
    # NumPy 2 moved its core, so that a file names it by the old or the new module.
    modules = ('numpy.core.multiarray', 'numpy._core.multiarray')
    return [
        HistoryBuffer,
        np.ndarray,
        *numbers,
        (_history_buffer_method, 'builtins.getattr'),
        (_number_dtype, 'numpy.dtype'),
        *((_empty_array, f'{module}._reconstruct') for module in modules),
        *((numpy_core.scalar, f'{module}.scalar') for module in modules),
    ]


def _history_buffer_method(owner: Any, name: str) -> Callable:
    """All that HistoryBuffer's pickle asks of ``getattr``: its four statistics."""
    if owner is not HistoryBuffer or name not in _STATISTICS:
        raise pickle.UnpicklingError(f'Refused getattr({owner!r}, {name!r})')
    return getattr(HistoryBuffer, name)


def _number_dtype(code: str, align: bool = False, copy: bool = False) -> np.dtype:
    """``numpy.dtype`` for numbers.

    A pickle asks for a copy, whose fields and flags it may then set at will, and so make NumPy take its bytes for
    pointers to objects. NumPy's own instance of a number type ignores such states.
    """
    if not isinstance(code, str) or not re.fullmatch(rf'[{_NUMBER_KINDS}]\d+', code):
        raise pickle.UnpicklingError(f'Refused numpy.dtype({code!r})')
    return np.dtype(code)


def _empty_array(kind: type, shape: tuple, code: bytes) -> np.ndarray:
    """The empty array that a pickle fills next; of no subclass and no other type than numbers."""
    if kind is not np.ndarray or shape != (0,) or code not in (b'b', 'b'):
        raise pickle.UnpicklingError(f'Refused numpy _reconstruct({kind!r}, {shape!r}, {code!r})')
    return numpy_core._reconstruct(kind, shape, code)
