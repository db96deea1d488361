"""What stands in a report, and that it goes on where it was."""

import hashlib
import html
import importlib.metadata
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from example_results import write_model
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmpretrain.registry import MODELS
from processes import run_script_in_fork

from mmadvmoe.report import PARTS, DamagedFileError, describe_model, make_examples, read_results, slug, write_report
from mmadvmoe.report.results import load_examples
from mmadvmoe.report.route_sections import dissection
from mmadvmoe.report.sections import sections_of
from mmadvmoe.visualization import png_bytes

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = {
    'facts',
    'summary',
    'curves',
    'dissection',
    'load',
    'images',
    'patches',
    'soundness',
    'training',
    'settings',
}


def results(folder, *names, **settings):
    for name in names:
        write_model(folder / slug(name), name, **settings)
    return [read_results(folder / slug(name)) for name in names]


@pytest.fixture
def blank_figures(monkeypatch):
    """For tests that read tables and texts of a page: most of its time would go into pixels."""
    blank = png_bytes(Figure(figsize=(0.1, 0.1)))
    monkeypatch.setattr('mmadvmoe.report.page.png_bytes', lambda figure: blank)


def rows_of(page):
    """The cells of all rows of all tables."""
    rows = re.findall(r'<tr>(.*?)</tr>', page.read_text(), re.DOTALL)
    return [[html.unescape(cell) for cell in re.findall(r'<t[hd][^>]*>(.*?)</t[hd]>', row)] for row in rows]


@pytest.mark.usefixtures('blank_figures')
def test_the_summary_has_a_column_for_each_model(tmp_path):
    (one,) = results(tmp_path, 'AdvMoE', ra=30.0)
    (other,) = results(tmp_path, 'AT(MoE)', ra=20.0)
    page = write_report(tmp_path, [one, other])
    rows = rows_of(page)
    assert '61.0% of the images provably keep theirs' in page.read_text()
    assert ['', 'AdvMoE', 'AT(MoE)'] in rows
    assert ['SA (clean)', '95.0', '95.0'] in rows
    assert ['pgd50', '40.0', '30.0'] in rows
    assert ['autoattack, after those above', '25.0', '15.0'] in rows
    assert ['worst of pgd50, routepgd50 (ra)', '30.0', '20.0'] in rows
    assert ['worst case of all', '25.0', '15.0'] in rows
    assert ['routes changed, at most', '50.0% (routepgd50)', '50.0% (routepgd50)'] in rows
    assert ['experts alone, route held', '20.0%', '25.0%', '96', '170', '16', '60'] in rows
    assert ['best expert of each image', '96.0%', '35.0%'] in rows
    assert ['evaluation: attacks.pgd50', "type='PGD', eps=0.2"] in rows
    assert ['evaluation: versions.torch', '2.14.1'] in rows
    assert ['torch', importlib.metadata.version('torch')] in rows


def test_the_page_needs_nothing_else_and_each_figure_is_a_file_too(tmp_path):
    page = write_report(tmp_path, results(tmp_path, 'AdvMoE'))
    text = page.read_text()
    sources = re.findall(r'(?:src|href|url)[=(]"?([^">)]{1,30})', text)
    assert all(source.startswith(('data:', '#')) for source in sources)
    assert '<script' not in text
    assert text.count('<img') == len(list((tmp_path / 'figures').glob('*.png'))) > 10


def test_a_report_shows_what_there_is(tmp_path):
    write_model(tmp_path / 'a', 'A', parts=())
    write_model(tmp_path / 'b', 'B', parts=['dissection'])
    (a, b) = (read_results(tmp_path / name) for name in 'ab')
    assert [section.name for section in sections_of([a])] == ['facts', 'summary', 'training', 'settings']
    assert [section.name for section in sections_of([a, b])] == [
        'facts',
        'summary',
        'dissection',
        'load',
        'training',
        'settings',
    ]
    write_report(tmp_path, [a, b])


def test_a_dense_model_has_no_routes(tmp_path):
    found = {section.name for section in sections_of(results(tmp_path, 'Dense', routing=None))}
    assert found == {'facts', 'summary', 'curves', 'dissection', 'images', 'soundness', 'training', 'settings'}


def test_curves_of_a_mixture_tell_what_the_gate_alone_would_say(tmp_path):
    (mixture,), (dense,) = results(tmp_path, 'MoE'), results(tmp_path, 'Dense', routing=None)
    eps, steps = next(section for section in sections_of([mixture, dense]) if section.name == 'curves').items
    drawn = {line.get_label(): list(line.get_ydata()) for line in steps.figure.axes[0].get_lines()}
    assert list(drawn) == ['MoE', 'MoE, gate alone', 'Dense']
    assert drawn['MoE'] == drawn['Dense'] == [50, 40, 34, 32, 30.4]
    assert drawn['MoE, gate alone'] == [55, 45, 39, 37, 35.4]
    assert [line.get_label() for line in eps.figure.axes[0].get_lines()] == ['MoE', 'Dense']


def test_flips_against_margin_are_drawn_for_the_mixtures_that_know_them(tmp_path):
    models = results(tmp_path, 'A', 'B') + results(tmp_path, 'Dense', routing=None)
    # As older versions wrote it.
    file = tmp_path / 'b' / 'dissection.json'
    content = json.loads(file.read_text())
    del content['flips_by_margin'], content['routes_certified']
    file.write_text(json.dumps(content))
    models[1] = read_results(tmp_path / 'b')
    assert not models[1].damaged

    def pictures(models):
        return {item.name: item for item in dissection(models).items if hasattr(item, 'figure')}

    picture = pictures(models)['flips_by_margin']
    (line,) = picture.figure.axes[0].get_lines()
    assert line.get_label() == 'A'
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0.25, 1.75], [50, 12.5])
    assert 'A: 50 at 0.25, 12 at 1.75.' in picture.alt
    assert list(pictures(models[1:])) == ['failures']


def test_a_curve_alone_stands_in_for_that_of_the_checks(tmp_path):
    (checked,), (alone,) = results(tmp_path, 'MoE'), results(tmp_path, 'Dense', routing=None, parts=['curve'])
    eps, steps = next(section for section in sections_of([checked, alone]) if section.name == 'curves').items
    # Of another number of images, which stands beside it.
    assert [line.get_label() for line in eps.figure.axes[0].get_lines()] == ['MoE (360 images)', 'Dense (100 images)']
    assert [line.get_label() for line in steps.figure.axes[0].get_lines()] == ['MoE', 'MoE, gate alone']
    assert '100 images' in eps.caption and '100 images' not in steps.caption


@pytest.mark.usefixtures('blank_figures')
def test_numbers_of_other_numbers_of_images_say_so_in_their_row(tmp_path):
    results(tmp_path, 'A', 'B')
    run, dissection = (tmp_path / 'b' / name for name in ('evaluation/run.json', 'dissection.json'))
    run.write_text(run.read_text().replace('"num_images": 360', '"num_images": 90'))
    dissection.write_text(dissection.read_text().replace('"num_images": 360', '"num_images": 400'))
    page = write_report(tmp_path, [read_results(tmp_path / name) for name in 'ab'])
    assert ['SA (clean)', '95.0 of 360', '95.0 of 90'] in rows_of(page)
    assert 'B (400 images): robust' in page.read_text()


def test_a_file_in_the_wrong_place_is_named(tmp_path):
    results(tmp_path, 'A')
    (tmp_path / 'a' / 'soundness.json').write_bytes((tmp_path / 'a' / 'dissection.json').read_bytes())
    (sentence,) = read_results(tmp_path / 'a').damaged
    assert re.search("soundness.json holds kind='dissection', not 'soundness'", sentence)
    (tmp_path / 'a' / 'dissection.json').write_text('{"kind": ')
    assert 'dissection.json is damaged' in read_results(tmp_path / 'a').damaged[0]
    with pytest.raises(FileNotFoundError, match='model.json is missing'):
        read_results(tmp_path)


def _cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _empty(file):
    file.write_text(json.dumps(dict(kind=file.stem)) if file.suffix == '.json' else '')


def _binary(file):
    file.write_bytes(b'\xff\x00\xfe')


def _garbled(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 3 : len(content) // 3 + 40] = bytes(40)
    file.write_bytes(content)


@pytest.mark.parametrize('harm', [_cut, _empty, _binary, _garbled])
def test_damaged_files_are_named_with_their_cure(tmp_path, harm):
    results(tmp_path, 'A')
    parts = ('evaluation/run.json', 'dissection.json', 'soundness.json', 'examples.npz', 'training.json')
    files = [tmp_path / 'a' / part for part in parts]
    for file in files:
        harm(file)
    for file, sentence in zip(files, read_results(tmp_path / 'a').damaged, strict=True):
        cure = file.parent if file.name == 'run.json' else 'it'
        assert sentence.startswith(f'{file} is damaged (') and sentence.endswith(
            f'; remove {cure} to have it made anew'
        )


@pytest.mark.usefixtures('blank_figures')
def test_a_damaged_file_leaves_the_rest_of_the_report_whole(tmp_path):
    results(tmp_path, 'A', 'B')
    a, whole = read_results(tmp_path / 'a'), SECTIONS - {'patches'}
    for part, missing in {
        'evaluation/run.json': set(),
        'dissection.json': {'dissection', 'load'},
        'soundness.json': {'curves', 'soundness'},
        'examples.npz': {'images'},
        'training.json': {'training'},
    }.items():
        write_model(tmp_path / 'b', 'B')
        _cut(tmp_path / 'b' / part)
        b = read_results(tmp_path / 'b')
        assert {section.name for section in sections_of([b])} == whole - missing | {'damaged'}
        assert {section.name for section in sections_of([a, b])} == whole | {'damaged'}
    rows = rows_of(write_report(tmp_path, [b]))
    assert [['B', sentence] in rows for sentence in b.damaged] == [True]
    assert ['SA (clean)', '95.0'] in rows


def test_metrics_that_are_not_those_of_their_checksum_are_damage(tmp_path):
    results(tmp_path, 'A')
    metrics = tmp_path / 'a' / 'evaluation' / 'metrics.json'
    digest = hashlib.sha256(metrics.read_bytes()).hexdigest()
    (metrics.parent / 'SHA256SUMS').write_text(f'{digest}  metrics.json\n')
    assert not read_results(tmp_path / 'a').damaged
    metrics.write_text(metrics.read_text().replace('5', '6', 1))
    (sentence,) = read_results(tmp_path / 'a').damaged
    assert str(metrics) in sentence and 'SHA256SUMS. Delete it' in sentence


@pytest.mark.parametrize(
    'part, change',
    [
        ('dissection.json', lambda content: content['attacks']['gate']['table'].pop('kept')),
        ('dissection.json', lambda content: content['load'].pop('clean')),
        ('dissection.json', lambda content: content['flips_by_margin'][1].pop('changed')),
        ('soundness.json', lambda content: content['curves']['eps'][1].update(ra=None)),
        ('training.json', lambda content: content.update(loss=5)),
    ],
)
def test_a_number_that_is_missing_is_damage_too(tmp_path, part, change):
    results(tmp_path, 'A')
    content = json.loads((tmp_path / 'a' / part).read_text())
    change(content)
    (tmp_path / 'a' / part).write_text(json.dumps(content))
    assert [Path(part).name in sentence for sentence in read_results(tmp_path / 'a').damaged] == [True]


def test_without_its_description_a_model_is_left_out(tmp_path):
    results(tmp_path, 'A')
    _cut(tmp_path / 'a' / 'model.json')
    with pytest.raises(DamagedFileError, match=f'model.json is damaged .*; remove {tmp_path / "a"} to have it made'):
        read_results(tmp_path / 'a')


def test_dollars_are_dollars(tmp_path):
    model = results(tmp_path, r'$\frac{$ and $x_1$')[0]
    content = json.loads((tmp_path / slug(model.name) / 'model.json').read_text())
    content['class_names'] = [r'$\frac{$'] * 10
    (tmp_path / slug(model.name) / 'model.json').write_text(json.dumps(content))
    dissection = json.loads((tmp_path / slug(model.name) / 'dissection.json').read_text())
    (tmp_path / slug(model.name) / 'dissection.json').write_text(
        json.dumps(dissection | dict(class_names=['$^$'] * 10))
    )
    page = write_report(tmp_path, [read_results(tmp_path / slug(model.name))])
    assert r'\$' not in html.unescape(page.read_text())


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A config and a checkpoint of a small mixture that routes tokens."""
    folder = tmp_path_factory.mktemp('trained')
    config = folder / 'vit.py'
    config.write_text(
        f"""_base_ = '{ROOT}/configs/advmoe_vit-small-moe_digits.py'
test_dataloader = dict(dataset=dict(indices=16))
test_cfg = dict(attacks=dict(
    _delete_=True,
    pgd=dict(type='PGD', eps=0.2, alpha=0.1, steps=2),
    routepgd=dict(type='RoutePGD', eps=0.2, alpha=0.1, steps=2)), survivors_only=[], worst_of=dict(_delete_=True))
"""
    )
    torch.manual_seed(4)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        cfg = Config.fromfile(config)
        model = MODELS.build(dict(cfg.model))
    # Some predictions of a model that learnt nothing must be right, or there is nothing to attack.
    torch.nn.init.normal_(model.head.fc.weight)
    torch.save(dict(state_dict=model.state_dict()), folder / 'epoch_1.pth')
    return str(config), str(folder / 'epoch_1.pth')


def test_examples_are_those_of_the_attack_on_routes(trained, tmp_path):
    config, checkpoint = trained
    describe_model(tmp_path, 'ViT-MoE', config, checkpoint)
    make_examples(tmp_path, 'cpu')
    saved = load_examples(tmp_path / 'examples.npz')
    assert saved.attack == 'routepgd'
    assert 1 <= len(saved.examples) <= 6
    change = (saved.examples.adversarial - saved.examples.images).abs()
    assert 0.1 < change.max() <= 0.2 + 1e-6
    assert [layer.shape for layer in saved.patches_before] == [(len(saved.examples), 17)]
    # One choice for each token, so that decisions and first choices are the same.
    assert np.array_equal(np.concatenate(saved.patches_after, 1), saved.examples.route_after.numpy())
    assert 'patches' in [section.name for section in sections_of([read_results(tmp_path)])]


def test_results_of_another_model_are_refused(trained, tmp_path):
    config, checkpoint = trained
    describe_model(tmp_path / 'out', 'A', config, checkpoint)
    describe_model(tmp_path / 'out', 'A', config, checkpoint)
    content = torch.load(checkpoint)
    content['state_dict']['head.fc.bias'] += 1
    torch.save(content, tmp_path / 'other.pth')
    with pytest.raises(ValueError, match='holds results of another model: checkpoint_sha256 differ'):
        describe_model(tmp_path / 'out', 'A', config, str(tmp_path / 'other.pth'))


def run_tool(monkeypatch, *arguments):
    tool = ROOT / 'tools' / 'analysis_tools' / 'robustness_report.py'
    monkeypatch.setattr(sys, 'argv', [str(tool), *map(str, arguments)])
    runpy.run_path(str(tool), run_name='__main__')


@pytest.fixture
def parts_in_this_process(monkeypatch):
    """The report runs its tools here, with short black-box attacks, where it would start a Python for each."""
    start = subprocess.run

    def run(command, **settings):
        if command[0] != sys.executable:
            return start(command, **settings)
        arguments = command[1:] + (['--queries', '20'] if Path(command[1]).name == 'check_attacks.py' else [])
        with monkeypatch.context() as patch:
            patch.setattr(sys, 'argv', arguments)
            runpy.run_path(arguments[0], run_name='__main__')
        return subprocess.CompletedProcess(command, returncode=0)

    monkeypatch.setattr(subprocess, 'run', run)
    monkeypatch.setattr('mmadvmoe.diagnosis.substitute._STEPS', 10)


@pytest.mark.usefixtures('parts_in_this_process')
def test_the_tool_measures_what_is_missing_and_keeps_what_is_there(trained, tmp_path, monkeypatch, capfd, request):
    model = ['--model', 'ViT-MoE', *trained]
    run_tool(monkeypatch, tmp_path, *model, '--attacks', 'pgd', 'routepgd', '--num-images', 8)
    found = read_results(tmp_path / 'vit_moe')
    rows = rows_of(tmp_path / 'report.html')
    assert ['worst case of all', f'{found.metrics["worst/accuracy/top1"]:.1f}'] in rows
    assert [
        'best expert of each image',
        *(f'{found.dissection["best_expert"][key]:.1f}%' for key in ('sa', 'ra')),
    ] in rows
    assert [[check['title'], check['status']] for check in found.soundness['checks']] == [
        row[:2] for row in rows if row[1:2] and row[1] in ('PASS', 'WARN', 'SKIP')
    ]
    missing = {'training'}
    # Its routes are those of tokens, of which there is no flow.
    assert {section.name for section in sections_of([found])} == SECTIONS - missing | {'classes'}
    # The checks of the attacks have the curve, too.
    parts = [tmp_path / 'vit_moe' / file for part, file in PARTS.items() if part != 'curve']
    kept = [part.stat().st_mtime_ns for part in parts]
    capfd.readouterr()
    request.getfixturevalue('blank_figures')
    run_tool(monkeypatch, tmp_path, *model)
    assert capfd.readouterr().out.count('is there') == len(PARTS)
    assert kept == [part.stat().st_mtime_ns for part in parts]
    (tmp_path / 'vit_moe' / PARTS['soundness']).unlink()
    run_tool(monkeypatch, tmp_path, *model, '--measure', 'curve', '--num-images', 8)
    alone = read_results(tmp_path / 'vit_moe')
    assert alone.curve['num_images'] == 8
    assert alone.curve['curves']['eps'] == found.soundness['curves']['eps']


@pytest.mark.usefixtures('blank_figures')
def test_a_part_that_fails_in_whatever_way_is_told_and_the_report_written(trained, tmp_path, monkeypatch, capfd):
    def fail(*_):
        raise OSError('no image there')

    monkeypatch.setattr('mmadvmoe.report.collect.attack_examples', fail)
    with pytest.raises(SystemExit):
        run_tool(monkeypatch, tmp_path, '--model', 'A', *trained, '--measure', 'examples')
    assert 'examples failed: OSError: no image there' in capfd.readouterr().out
    assert (tmp_path / 'report.html').is_file()


def test_two_models_need_two_names(trained, tmp_path, monkeypatch, capfd):
    with pytest.raises(SystemExit):
        run_tool(monkeypatch, tmp_path, '--model', 'A!', *trained, '--model', 'a', *trained)
    assert "they give the folders ['a', 'a']" in capfd.readouterr().err


@pytest.mark.usefixtures('blank_figures')
def test_the_tool_goes_on_with_the_other_models(trained, tmp_path, monkeypatch, capfd):
    start = subprocess.run

    def run(command, **settings):
        if command[0] != sys.executable:
            return start(command, **settings)
        return subprocess.CompletedProcess(command, run_script_in_fork(command[1:]))

    monkeypatch.setattr(subprocess, 'run', run)
    write_model(tmp_path / 'a', 'A')
    config, checkpoint = trained
    log = tmp_path / 'run' / '20260101_000000' / 'vis_data' / 'scalars.json'
    log.parent.mkdir(parents=True)
    log.write_text('[]\n{"loss": 1.0, "iter": 1, "step": 1}\n')
    (tmp_path / 'run' / 'epoch_1.pth').write_bytes(Path(checkpoint).read_bytes())
    _cut(tmp_path / 'a' / 'model.json')
    damaged = tmp_path / 'damaged.pth'
    content = bytearray(Path(checkpoint).read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(SystemExit):
        run_tool(
            monkeypatch,
            tmp_path,
            *('--measure', 'evaluation', '--attacks', 'pgd'),
            *('--model', 'A', *trained),
            *('--model', 'B', config, tmp_path / 'run' / 'epoch_1.pth'),
            *('--model', 'C', config, damaged),
            *('--model', 'D', tmp_path / 'no.py', checkpoint),
        )
    # Of B alone it is known whose results these would be; those of A are from before.
    assert [(tmp_path / name / PARTS['evaluation']).is_file() for name in 'bc'] == [True, False]
    rows = rows_of(tmp_path / 'report.html')
    (of_a,), (of_b,), (of_c,) = ([row[1] for row in rows if row[0] == name and len(row) == 2] for name in 'ABC')
    assert 'damaged.pth' in of_c and 'CRC-32' in of_c
    assert 'a/model.json is damaged' in of_a
    assert of_b == f'{log}, line 1 is no record of scalars: []; remove the line to have the training shown'
    assert any(row[0] == 'D' and 'no.py' in row[1] for row in rows if len(row) == 2)
    capfd.readouterr()
    with pytest.raises(SystemExit):  # other attacks than those which are there
        model = ('--model', 'B', config, tmp_path / 'run' / 'epoch_1.pth')
        run_tool(monkeypatch, tmp_path, *model, '--measure', 'evaluation', '--attacks', 'pgd', 'fgsm')
    assert "run.json is of ['pgd', " in capfd.readouterr().out.replace(str(tmp_path), '')
    assert ['', 'B'] in rows
