"""One call from a model and images to robust accuracy, that can be killed at any moment."""

import json
import multiprocessing
import os
import resource
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchattacks
from mmpretrain.registry import MODELS
from PIL import Image
from tiny_models import dense_backbone
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

from mmadvmoe.apis import evaluate_robustness
from mmadvmoe.attacks import Victim, build_attack
from mmadvmoe.datasets import Digits
from mmadvmoe.evaluation import read_evaluation
from mmadvmoe.evaluation.data import as_dataset
from mmadvmoe.registry import ATTACKS

WEAK = dict(
    pgd=dict(type='PGD', eps=0.1, alpha=0.05, steps=2),
    fgsm=dict(type='FGSM', eps=0.2),
    square=dict(type='Square', eps=0.2, n_queries=4),
)
DIGITS = dict(type='Digits', split='test', indices=20, pipeline=[dict(type='PackInputs')])


@ATTACKS.register_module()
class _Deadly(torchattacks.PGD):
    """PGD that ends the process at its third call."""

    calls = 0

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        type(self).calls += 1
        if self.calls == 3 and 'DEADLY' in os.environ:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(images, labels)


@ATTACKS.register_module()
class _Raising(torchattacks.PGD):
    """PGD that fails on its second batch."""

    calls = 0

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 2:
            raise ArithmeticError('no way up')
        return super().forward(images, labels)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A process that is forked has no threads to compute with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _images(count: int = 20) -> tuple[Tensor, Tensor]:
    dataset = Digits(split='test', indices=count)
    images = torch.stack([torch.from_numpy(dataset.get_data_info(i)['img'].transpose(2, 0, 1)) for i in range(count)])
    return images / 255, torch.from_numpy(dataset.get_gt_labels())


def _dense() -> nn.Module:
    """A classifier of [0, 1] images: the digit whose mean is nearest."""
    images, labels = _images(100)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    means = torch.stack([images[labels == c].flatten(1).mean(0) for c in range(10)])
    model[1].load_state_dict(dict(weight=means, bias=-means.square().sum(1) / 2))
    return model


def _moe() -> Victim:
    torch.manual_seed(0)
    router = dict(type='ResNetRouter', base_channels=4, num_blocks=1)
    backbone = dense_backbone(4)
    model = MODELS.build(
        dict(
            type='mmpretrain.RobustClassifier',
            backbone=dict(
                type='MoEBackbone', num_experts=2, include=[r'layer1.*conv\d'], router=router, backbone=backbone
            ),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(type='LinearClsHead', num_classes=10, in_channels=8),
        )
    )
    model.init_weights()
    return Victim(model)


evaluate = partial(evaluate_robustness, chunk_size=8)


def _lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / 'outcomes.jsonl').read_text().splitlines()]


def test_the_numbers_are_those_of_attacking_by_hand() -> None:
    model, (images, labels) = _dense(), _images()
    result = evaluate(model, (images, labels), WEAK, chunk_size=20)
    standing = model(images).argmax(1) == labels
    assert result.clean_accuracy == pytest.approx(standing.double().mean().item())
    for name, cfg in WEAK.items():
        # Seeds matter to none of the three enough to change a prediction here.
        adversarial = build_attack(cfg, Victim(model))(images, labels, seed=0)
        standing &= model(adversarial).argmax(1) == labels
        assert (result.outcomes.by_name[name].distance[:, 0] <= cfg['eps'] + 1e-6).all()
    assert result.robust_accuracy == pytest.approx(standing.double().mean().item())
    assert 0 < result.robust_accuracy < result.clean_accuracy
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_every_kind_of_data_gives_the_same() -> None:
    images, labels = _images()
    kinds = [(images, labels), DIGITS, TensorDataset(images, labels), ((images * 255).round().byte(), labels)]
    first, *others = (evaluate(_dense(), data, WEAK).outcomes for data in kinds)
    for other in others:
        assert all(torch.equal(first.by_name[name].logits, other.by_name[name].logits) for name in first.by_name)


def test_a_cascade_attacks_what_stands_and_comes_to_the_same(tmp_path: Path) -> None:
    whole = evaluate(_dense(), DIGITS, WEAK)
    cascade = evaluate(_dense(), DIGITS, WEAK, cascade=True, out_dir=tmp_path)
    assert cascade.robust_accuracy == whole.robust_accuracy
    standing = torch.ones(20, dtype=torch.bool)
    for name, outcome in cascade.outcomes.by_name.items():
        assert torch.equal(outcome.attacked, standing & (name != 'clean'))
        standing &= outcome.prediction == cascade.outcomes.label
    assert 0 < standing.sum() < 20
    assert [line['robust'] for line in _lines(tmp_path)] == standing.tolist()
    assert [line['attacks']['pgd']['attacked'] for line in _lines(tmp_path)].count(False) > 0


def test_a_mixture_of_experts_is_always_attacked_through_its_routes() -> None:
    result = evaluate(_moe(), DIGITS, ['fgsm'], eps=0.1)
    assert list(result.outcomes.by_name) == ['clean', 'fgsm', 'routepgd50', 'fgsm-held']
    assert (result.outcomes.by_name['routepgd50'].distance[:, 0] <= 0.1 + 1e-6).all()
    assert {'fgsm/route_changed', 'clean/expert_share/1', 'worst/accuracy/top1'} <= result.metrics.keys()
    own = dict(fgsm=dict(type='FGSM', eps=0.1), mine=dict(type='RoutePGD', eps=0.1, steps=1))
    assert list(evaluate(_moe(), DIGITS, own).outcomes.by_name) == ['clean', 'fgsm', 'fgsm-held', 'mine']
    assert list(evaluate(_dense(), DIGITS, ['fgsm'], eps=0.1).outcomes.by_name) == ['clean', 'fgsm']
    with pytest.raises(TypeError, match=r'attacks\.own must be the config of an attack'):
        evaluate(_moe(), DIGITS, dict(own=dict(eps=0.1)))


def test_a_record_says_what_became_of_an_image(tmp_path: Path) -> None:
    result = evaluate(_moe(), DIGITS, dict(some=dict(type='RoutePGD', eps=0.1, steps=1)), out_dir=tmp_path)
    lines = _lines(tmp_path)
    assert [line['index'] for line in lines] == list(range(20))
    clean, some = result.outcomes.by_name.values()
    for i, line in enumerate(lines):
        assert line['label'] == result.outcomes.label[i]
        assert line['clean'] == dict(prediction=int(clean.prediction[i]), route=clean.expert[i].tolist())
        entry = line['attacks']['some']
        assert entry['prediction'] == some.prediction[i] and entry['route'] == some.expert[i].tolist()
        assert [entry[norm] for norm in ('linf', 'l2', 'l1')] == pytest.approx(some.distance[i].tolist())
    assert json.loads((tmp_path / 'metrics.json').read_text()) == result.metrics
    saved = read_evaluation(tmp_path)
    assert saved.metrics == result.metrics and saved.settings['chunk_size'] == 8
    assert torch.equal(saved.outcomes.by_name['some'].logits, some.logits)


# With a route named, none of them is made with the route held as well.
DEADLY = dict(
    first=dict(WEAK['fgsm'], route='gate'),
    deadly=dict(type='_Deadly', eps=0.2, alpha=0.1, steps=2, route='gate'),
    last=dict(WEAK['square'], route='gate'),
)


def _files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ('outcomes.jsonl', 'metrics.json')}


def test_a_killed_evaluation_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = partial(evaluate, _moe(), DIGITS, DEADLY)
    run(out_dir=tmp_path / 'whole')
    monkeypatch.setenv('DEADLY', '1')
    monkeypatch.setattr(_Deadly, 'calls', 0)
    killed = multiprocessing.get_context('fork').Process(
        target=run, kwargs=dict(out_dir=tmp_path / 'killed'), daemon=True
    )
    killed.start()
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    assert not (tmp_path / 'killed' / 'metrics.json').exists()
    # RoutePGD came beside the first; the third chunk had its outcome under both.
    parts = sorted(path.name for path in (tmp_path / 'killed' / 'parts').iterdir())
    assert len(parts) == 2 * 5 + 3 and parts[-1] == '000002.02-routepgd2.pt'
    assert len(read_evaluation(tmp_path / 'killed').outcomes.label) == 16
    monkeypatch.delenv('DEADLY')
    run(out_dir=tmp_path / 'killed')
    # In the new run the attack was made on the last chunk alone.
    assert _Deadly.calls == 1
    assert _files(tmp_path / 'killed') == _files(tmp_path / 'whole')


def _one_of_two(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)
    store = f'file://{folder / "store"}'
    torch.distributed.init_process_group('gloo', init_method=store, rank=rank, world_size=2)
    result = evaluate(_moe(), DIGITS, WEAK, out_dir=folder / 'two')
    torch.save(result.metrics, folder / f'{rank}.pt')
    # One of the two finds that the folder is another's, and both stop.
    with pytest.raises(ValueError, match='settings.seed is 0 there and 1 here'):
        evaluate(_moe(), DIGITS, WEAK, seed=1, out_dir=folder / 'two')
    torch.distributed.destroy_process_group()


def test_two_processes_write_what_one_writes(tmp_path: Path) -> None:
    result = evaluate(_moe(), DIGITS, WEAK, out_dir=tmp_path / 'one')
    torch.multiprocessing.start_processes(_one_of_two, (tmp_path,), nprocs=2, start_method='fork')
    assert _files(tmp_path / 'one') == _files(tmp_path / 'two')
    assert torch.load(tmp_path / '0.pt') == torch.load(tmp_path / '1.pt') == result.metrics


def test_a_failing_attack_is_named_and_what_was_done_is_kept(tmp_path: Path) -> None:
    attacks = dict(fgsm=WEAK['fgsm'], bad=dict(type='_Raising', eps=0.1, alpha=0.1, steps=1))
    with pytest.raises(RuntimeError, match="attack 'bad' failed on images 8 to 15 .*ArithmeticError: no way up"):
        evaluate(_dense(), DIGITS, attacks, out_dir=tmp_path)
    assert len(read_evaluation(tmp_path).outcomes.label) == 8
    # Built anew, the attack fails on its second batch again: that is a later one now, and then past the end.
    with pytest.raises(RuntimeError, match="attack 'bad' failed on images 16 to 19"):
        evaluate(_dense(), DIGITS, attacks, out_dir=tmp_path)
    evaluate(_dense(), DIGITS, attacks, out_dir=tmp_path)
    assert len(_lines(tmp_path)) == 20


def test_a_full_disk_stops_with_a_word_and_the_evaluation_goes_on(tmp_path: Path) -> None:
    evaluate(_dense(), DIGITS, WEAK, out_dir=tmp_path / 'whole')
    sizes = {path: path.stat().st_size for path in (tmp_path / 'whole').rglob('*') if path.is_file()}
    largest = max(size for path, size in sizes.items() if path.suffix == '.pt')
    # Room for every part, but not for all outcomes in one file.
    assert largest < sizes[tmp_path / 'whole' / 'outcomes.jsonl']
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        with pytest.raises(OSError, match=r'outcomes\.jsonl.* could not be written .*make room there and start'):
            evaluate(_dense(), DIGITS, WEAK, out_dir=tmp_path / 'full')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    left, after = (tmp_path / 'full').rglob('*'), ('outcomes.jsonl', 'SHA256SUMS', 'metrics.json')
    left = sorted(path.name for path in left if path.is_file())
    assert left == sorted(path.name for path in sizes if path.name not in after)
    evaluate(_dense(), DIGITS, WEAK, out_dir=tmp_path / 'full')
    assert _files(tmp_path / 'full') == _files(tmp_path / 'whole')


class _Samples(Dataset):
    """A data set of one sample."""

    def __init__(self, sample: object) -> None:
        self.sample = sample

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> object:
        return self.sample


BAD = {
    'not finite': (
        dict(model=nn.Sequential(nn.Flatten(), nn.LazyLinear(10))),
        FloatingPointError,
        r"logits of 8 of 8 images are not finite in 'clean' \(images \[0, 1",
    ),
    'too few classes': (
        dict(model=nn.Sequential(nn.Flatten(), nn.Linear(192, 4))),
        ValueError,
        r'num_classes=4 differs from the 10 classes of data\.dataset \(Digits\)',
    ),
    'eps of 0..255': (dict(attacks=dict(pgd=dict(type='PGD', eps=8))), ValueError, r'eps=8 is above 1.*8 / 255'),
    'L2 eps of 0..255': (
        dict(attacks=dict(pgd=dict(type='PGDL2', eps=128))),
        ValueError,
        r"attack 'pgd': eps=128 in L2 is above 13\.86, .*; .* write eps=128 / 255",
    ),
    'images of 0..255': (
        dict(data=(torch.full((4, 3, 8, 8), 200.0), torch.zeros(4, dtype=torch.int64))),
        ValueError,
        r'images 0 to 0 of the data must be in \[0, 1\], got values from 200 to 200; divide .* by 255',
    ),
    'images of int64': (
        dict(data=(torch.full((4, 3, 8, 8), 200), torch.zeros(4, dtype=torch.int64))),
        TypeError,
        r'torch\.int64, which does not tell what is white; .* torch\.uint8 or torch\.uint16',
    ),
    'PIL images': (
        dict(data=_Samples((Image.new('RGB', (8, 8)), 0))),
        TypeError,
        r'sample 0 .*\(Image, int\).* tensor \(C, H, W\); of PIL images .*to_tensor',
    ),
    'arrays': (
        dict(data=_Samples((np.zeros((8, 8, 3), np.uint8), 0))),
        TypeError,
        r'sample 0 .*\(ndarray of shape \(8, 8, 3\), int\).* arrays \(H, W, C\)',
    ),
    'Hugging Face dicts': (
        dict(data=_Samples(dict(image=Image.new('RGB', (8, 8)), label=0))),
        TypeError,
        r"inputs and data_samples, .* \['image', 'label'\]",
    ),
    'one-hot labels': (
        dict(data=_Samples((torch.rand(3, 8, 8), torch.eye(10)[3]))),
        TypeError,
        r'Tensor of shape \(10,\).* class index; of one-hot labels that is label\.argmax\(\)',
    ),
    'one-hot labels of tensors': (
        dict(data=(torch.rand(4, 3, 8, 8), torch.eye(10)[:4])),
        ValueError,
        r'of one-hot labels that is labels\.argmax\(1\)\), got \(4, 3, 8, 8\) and torch\.float32 \(4, 10\)',
    ),
    'arrays of images and labels': (
        dict(data=(np.zeros((4, 3, 8, 8), np.float32), np.zeros(4, np.int64))),
        TypeError,
        r'the tensors \(images, labels\), got a tuple; torch\.stack and torch\.from_numpy make tensors of',
    ),
    'a list of samples': (
        dict(data=[(torch.rand(3, 8, 8), 0)] * 4),
        TypeError,
        r'got a list; torch\.stack and torch\.from_numpy make tensors of samples and arrays',
    ),
    'labels of others': (
        dict(data=(torch.rand(4, 3, 8, 8), torch.zeros(3, dtype=torch.int64))),
        ValueError,
        r'images \(B, C, H, W\) and labels \(B,\)',
    ),
    'data of another kind': (dict(data='digits'), TypeError, 'data must be .*got a str'),
    'no radius': (dict(attacks=['pgd50']), ValueError, r"attack 'pgd50' needs a radius in norm Linf \(eps"),
    'unknown name': (dict(attacks=['pdg'], eps=0.1), ValueError, "there is no attack 'pdg'; allowed: fgsm, pgd<steps>"),
}


class _Foreign(nn.Module):
    """Someone else's, in which ``backbone`` and ``num_classes`` mean something else."""

    num_classes = 1000

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.fc = nn.Flatten(), nn.Linear(192, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.backbone(x))


def test_a_module_of_someone_else_tells_its_classes_by_its_logits() -> None:
    cfg = dict(type='AutoAttack', eps=0.1, attacks_to_run=['apgd-ce'], steps=2)
    assert evaluate(_Foreign(), DIGITS, dict(aa=cfg)).outcomes.by_name['aa'].logits.shape == (20, 10)


def test_a_subset_of_some_classes_is_evaluated() -> None:
    digits = as_dataset(DIGITS)
    few = [index for index in range(len(digits)) if digits.get_cat_ids(index)[0] < 4]
    linear = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    result = evaluate(linear, Subset(digits, few), WEAK)
    assert result.outcomes.label.tolist() == [digits.get_cat_ids(index)[0] for index in few]


@pytest.mark.parametrize('case', BAD)
def test_bad_input_is_named(case: str) -> None:
    changes, error, message = BAD[case]
    if case == 'not finite':
        changes['model'](torch.rand(1, 3, 8, 8))
        nn.init.constant_(changes['model'][1].weight, torch.nan)
    with pytest.raises(error, match=message):
        evaluate(**(dict(model=_dense(), data=DIGITS, attacks=WEAK) | changes))


def test_a_model_and_data_of_other_classes_are_told_before_anything_runs(tmp_path: Path) -> None:
    model = MODELS.build(
        dict(
            type='mmpretrain.ImageClassifier',
            backbone=dense_backbone(4),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(type='LinearClsHead', num_classes=7, in_channels=8),
        )
    )
    with pytest.raises(ValueError, match='num_classes=7 differs from the 10 classes of data.dataset'):
        evaluate(Victim(model), DIGITS, WEAK, out_dir=tmp_path / 'nothing')
    assert not (tmp_path / 'nothing').exists()


def test_a_folder_of_another_evaluation_is_refused_or_overwritten(tmp_path: Path) -> None:
    evaluate(_dense(), DIGITS, WEAK, out_dir=tmp_path)
    before = _files(tmp_path)
    other = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    with pytest.raises(ValueError, match=r'another evaluation: settings\.model\.sha256 is "\w+" there and "\w+" here'):
        evaluate(other, DIGITS, WEAK, out_dir=tmp_path)
    backwards = dict(reversed(WEAK.items()))
    with pytest.raises(ValueError, match=r'order of settings\.attacks is .* there and .* here\. To go on .*overwrite'):
        evaluate(_dense(), DIGITS, backwards, out_dir=tmp_path)
    images, labels = _images()
    evaluate(_dense(), (images, labels), WEAK, out_dir=tmp_path / 'tensors')
    with pytest.raises(ValueError, match='outcomes of other images or labels than those of chunk 0'):
        evaluate(_dense(), (1 - images, labels), WEAK, out_dir=tmp_path / 'tensors')
    assert _files(tmp_path) == before
    evaluate(_dense(), DIGITS, dict(pgd=WEAK['pgd']), out_dir=tmp_path, overwrite=True)
    assert all(list(line['attacks']) == ['pgd'] for line in _lines(tmp_path))
    assert len(list((tmp_path / 'parts').iterdir())) == 3 * 2


def test_a_module_that_holds_more_than_its_weights_is_not_taken_for_another(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.model, self.scale = _dense(), scale

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x * self.scale)

    evaluate(Scaled(1.0), DIGITS, WEAK, num_classes=10, out_dir=tmp_path)
    with pytest.raises(ValueError, match='holds outcomes of another model, whose weights are the same'):
        evaluate(Scaled(0.3), DIGITS, WEAK, num_classes=10, out_dir=tmp_path)
    evaluate(Scaled(1.0), DIGITS, WEAK, num_classes=10, out_dir=tmp_path)


def test_a_folder_of_an_own_attack_is_not_taken_for_that_of_a_mended_one(tmp_path: Path, monkeypatch) -> None:
    source = """
from torchattacks.attack import Attack


class Own(Attack):
    def __init__(self, model):
        super().__init__('Own', model)

    def forward(self, images, labels):
        return images
"""
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / 'own_attack.py'
    file.write_text(source)
    import own_attack

    run = partial(evaluate, _dense(), DIGITS, dict(own=dict(type=own_attack.Own)), out_dir=tmp_path / 'out')
    assert run().metrics == run().metrics
    file.write_text(source.replace('return images', 'return 1 - images'))
    with pytest.raises(ValueError, match='settings.own_attacks is'):
        run()
