"""Files of a run or an evaluation, damaged, swapped or foreign: each is refused by name, or read as it was written."""

import atexit
import importlib.util
import io
import itertools
import os
import random
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from malicious_files import PythonPickle, malicious
from mmengine.config import Config
from mmengine.model import Sequential
from mmengine.runner import Runner, load_checkpoint
from resume_runs import assert_same, small_cfg
from tiny_runs import CLASSES, model_cfg
from torch import nn

from mmadvmoe.apis import evaluate_robustness, load_robust_model
from mmadvmoe.evaluation import read_evaluation
from mmadvmoe.runtime.checkpoint_folder import CheckpointFolder
from mmadvmoe.runtime.files import seal
from mmadvmoe.runtime.safe_load import CheckpointError, load_from_local

CONVERTER = Path(__file__).parents[2] / 'tools/model_converters/robust_moe_cnn_to_mmadvmoe.py'
ATTACKS = dict(fgsm=dict(type='FGSM', eps=0.1), pgd=dict(type='PGD', eps=0.1, alpha=0.05, steps=1))
_NUMBERS = itertools.count()


# ---- what is damaged: made once for each process


def scratch(name) -> Path:
    """A folder that is there until the process ends."""
    folder = Path(mkdtemp(prefix='faults-'))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder / name


def build_runner(folder, **overrides):
    cfg = Config(small_cfg(work_dir=str(folder), experiment_name=f'fault_{os.getpid()}_{next(_NUMBERS)}', **overrides))
    return Runner.from_cfg(cfg)


@cache
def trained() -> Path:
    """The folder of a training of two epochs."""
    folder = scratch('trained')
    build_runner(folder, train_cfg=dict(by_epoch=True, max_epochs=2)).train()
    return folder


def linear(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES))


def evaluate(folder, seed=0, **options):
    images = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return evaluate_robustness(
        linear(seed), (images, torch.arange(12) % CLASSES), ATTACKS, chunk_size=4, out_dir=folder, **options
    )


@cache
def evaluated(seed=0) -> Path:
    """The folder of an evaluation: three chunks, without an attack and under two."""
    folder = scratch('evaluated')
    evaluate(folder, seed)
    return folder


# ---- how it is damaged


def flip(content: bytes, generator: random.Random) -> bytes:
    """Change 1 to 200 bytes, most often few."""
    damaged = bytearray(content)
    for _ in range(min(len(content), int(200 ** generator.random()))):
        damaged[generator.randrange(len(damaged))] ^= generator.randrange(1, 256)
    return bytes(damaged)


def cut(content: bytes, generator: random.Random) -> bytes:
    """Keep the beginning, or nothing."""
    return content[: generator.choice([0, 1, len(content) - 1, generator.randrange(len(content))])]


# ---- who reads it


def _converted(path, folder):
    spec = importlib.util.spec_from_file_location('converter', CONVERTER)
    converter = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(converter)
    config = CONVERTER.parents[2] / 'configs/advmoe_resnet18_digits.py'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('sys.argv', ['converter', str(path), str(folder / 'out.pth'), '--config', str(config)])
        converter.main()


def _resumed(path, folder):
    shutil.copy(path, folder / 'epoch_1.pth')
    build_runner(folder, resume=True).train()


#: What reads a checkpoint: ``read(path, an empty folder)``.
READERS = {
    'load_from_local': lambda path, folder: load_from_local(path),
    'load_checkpoint of MMEngine': lambda path, folder: load_checkpoint(nn.Linear(3, 2), str(path)),
    'init_cfg': lambda path, folder: Sequential(
        nn.Linear(3, 2), init_cfg=dict(type='Pretrained', checkpoint=str(path))
    ).init_weights(),
    'load_from': lambda path, folder: build_runner(folder, load_from=str(path)).train(),
    '--resume FILE': lambda path, folder: build_runner(folder, load_from=str(path), resume=True).train(),
    '--resume': _resumed,
    'val': lambda path, folder: build_runner(folder, load_from=str(path)).val(),
    'load_robust_model': lambda path, folder: load_robust_model(Config(dict(model=model_cfg())), path),
    'converter': _converted,
}


# ---- the cases: each gives in a word what became of it, or fails


def _checkpoint(folder: Path, content: bytes, damaged: bytes) -> str:
    """A run whose newest checkpoint is damaged goes on from the one before."""
    for name in ('epoch_1.pth', 'last_checkpoint'):
        shutil.copy(trained() / name, folder)
    path = folder / 'epoch_2.pth'
    path.write_bytes(content)
    whole = load_from_local(path)
    path.write_bytes(damaged)
    try:
        assert_same(whole, load_from_local(path))
        return 'read whole'
    except CheckpointError as error:
        assert str(path) in str(error)
    warnings = []
    chosen = CheckpointFolder(str(folder), 'epoch_{}.pth').choose(str(folder), warnings.append)
    assert chosen == str(folder / 'epoch_1.pth') and 'epoch_2.pth' in warnings[0]
    return 'refused'


def _zip() -> bytes:
    return (trained() / 'epoch_2.pth').read_bytes()


def _saved_as(**options) -> bytes:
    buffer = io.BytesIO()
    torch.save(load_from_local(trained() / 'epoch_2.pth'), buffer, **options)
    return buffer.getvalue()


def checkpoint(folder, generator, damage):
    return _checkpoint(folder, _zip(), damage(_zip(), generator))


def foreign_checkpoint(folder, generator, damage):
    """One without our seal, as MMEngine's own hook writes it."""
    content = _saved_as()
    return _checkpoint(folder, content, damage(content, generator))


def legacy_checkpoint(folder, generator, damage):
    """A sealed file in PyTorch's format before 1.6, which has no checksums of its own."""
    content = seal(_saved_as(_use_new_zipfile_serialization=False))
    return _checkpoint(folder, content, damage(content, generator))


def pointer(folder, generator, damage):
    """Whatever the pointer says, a run goes on from a whole checkpoint of its own folder."""
    shutil.copytree(trained(), folder / 'run')
    path = folder / 'run' / 'last_checkpoint'
    path.write_bytes(damage(path.read_bytes(), generator))
    warnings = []
    own = CheckpointFolder(str(folder / 'run'), 'epoch_{}.pth')
    chosen = own.choose(str(folder / 'run'), warnings.append)
    assert own.holds(chosen)
    load_from_local(chosen)
    assert chosen.endswith('epoch_2.pth')
    return 'told' if warnings else 'read whole'


def _evaluation(folder: Path, name: str, generator, damage) -> str:
    """An evaluation of which one file is damaged is refused by name, read and gone on with; or it is as it was."""
    shutil.copytree(evaluated(), folder / 'run')
    path = folder / 'run' / name
    path.write_bytes(damage(path.read_bytes(), generator))
    words = []
    for read in (lambda: read_evaluation(folder / 'run'), lambda: evaluate(folder / 'run')):
        try:
            found = read()
        except ValueError as error:
            assert str(path) in str(error) or 'run.json' in str(error)
            words.append('refused')
        else:
            expected = read_evaluation(evaluated())
            assert {**found.metrics} == expected.metrics
            for attack, outcome in expected.outcomes.by_name.items():
                assert torch.equal(outcome.logits, found.outcomes.by_name[attack].logits)
            words.append('read whole')
    return words[0] if len(set(words)) == 1 else ', '.join(words)


def part(folder, generator, damage):
    parts = sorted(path.relative_to(evaluated()) for path in evaluated().glob('parts/*'))
    return _evaluation(folder, str(generator.choice(parts)), generator, damage)


def run_json(folder, generator, damage):
    return _evaluation(folder, 'run.json', generator, damage)


def metrics_json(folder, generator, damage):
    return _evaluation(folder, 'metrics.json', generator, damage)


def swapped_parts(folder, generator):
    """Two parts of one evaluation, or one of an evaluation of another model, under each other's names."""
    shutil.copytree(evaluated(), folder / 'run')
    names = sorted(path.name for path in evaluated().glob('parts/*'))
    one, other = generator.sample(names, 2)
    parts = folder / 'run' / 'parts'
    if generator.random() < 0.5:
        shutil.copy(evaluated(seed=1) / 'parts' / one, parts)
    else:
        shutil.copy(evaluated() / 'parts' / one, parts / other)
        shutil.copy(evaluated() / 'parts' / other, parts / one)
    for read in (read_evaluation, evaluate):
        with pytest.raises(ValueError, match='does not hold what its name says'):
            read(folder / 'run')
    return 'refused'


DAMAGED = {
    'checkpoint': checkpoint,
    'checkpoint without seal': foreign_checkpoint,
    'checkpoint in the legacy format': legacy_checkpoint,
    'last_checkpoint': pointer,
    'part': part,
    'run.json': run_json,
    'metrics.json': metrics_json,
}


def damaged_for_each_reader(folder, number):
    """A flipped checkpoint, by way of every reader."""
    name, read = list(READERS.items())[number % len(READERS)]
    path = folder / 'damaged.pth'
    content = bytearray(_zip())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    (folder / 'run').mkdir()
    with pytest.raises(CheckpointError, match='damaged.*SHA-256'):
        read(path, folder / 'run')
    return 'refused'


def malicious_file(folder, number):
    """A payload in a checkpoint for each of the readers, or in a part of an evaluation."""
    marker = folder / 'executed'
    payloads = malicious(marker)
    readers = [*READERS, 'part of an evaluation']
    payload = list(payloads.values())[number % len(payloads)]
    reader = readers[number // len(payloads) % len(readers)]
    path = folder / 'evil.pth'
    if reader in READERS:
        content = load_from_local(trained() / 'epoch_1.pth')
        place = ('meta', 'message_hub', 'state_dict')[number % 3]
        content[place]['payload'] = payload
        torch.save(content, path, pickle_module=PythonPickle)
        (folder / 'run').mkdir()
        with pytest.raises(CheckpointError, match='refused: it asks for .*executed'):
            READERS[reader](path, folder / 'run')
    else:
        shutil.copytree(evaluated(), folder / 'run')
        first = sorted(folder.glob('run/parts/*'))[0]
        buffer = io.BytesIO()
        torch.save(dict(torch.load(first, weights_only=True), payload=payload), buffer, pickle_module=PythonPickle)
        first.write_bytes(seal(buffer.getvalue()))
        with pytest.raises(ValueError, match='is damaged'):
            read_evaluation(folder / 'run')
    assert not marker.exists()
    return 'refused'


PAYLOADS = list(malicious('x'))
NUM_MALICIOUS = len(PAYLOADS) * (len(READERS) + 1)
