"""What figures show is what they were given."""

import io
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle
from PIL import Image

from mmadvmoe.evaluation import Examples
from mmadvmoe.visualization import (
    Line,
    draw_confusion,
    draw_image_grid,
    draw_lines,
    draw_loads,
    draw_parts,
    draw_patch_routes,
    draw_training,
    patch_grid,
    png_bytes,
    save_png,
)


def examples(label, before, after, route_before=None, route_after=None):
    size = len(label)
    images = torch.rand(size, 3, 6, 6)
    route = torch.zeros(size, 0, dtype=torch.int64)
    return Examples(
        images,
        (images + 0.1).clamp(0, 1),
        torch.tensor(label),
        torch.tensor(before),
        torch.tensor(after),
        route if route_before is None else torch.tensor(route_before),
        route if route_after is None else torch.tensor(route_after),
    )


def test_lines_differ_without_colour_and_keep_their_points():
    lines = [Line('a', [0, 1], [90, 10], 0), Line('b', [0, 1], [80, 20], 1), Line('a, attacked', [0, 1], [5, 4], 0, 1)]
    (axes,) = draw_lines(lines, 'title', 'eps', 'RA', (0, 100)).axes
    drawn = axes.get_lines()
    assert [list(line.get_ydata()) for line in drawn] == [[90, 10], [80, 20], [5, 4]]
    assert len({(line.get_marker(), line.get_linestyle()) for line in drawn}) == 3
    assert axes.get_ylim() == (0, 100) and axes.get_xlim()[0] == 0


def test_one_channel_is_drawn_in_gray_as_it_is():
    shown = examples([0], [0], [0])
    shown.images[:, 1:] = shown.images[:, :1]
    shown.adversarial.copy_((shown.images + 0.1).clamp(0, 1))
    gray = replace(shown, images=shown.images[:, :1], adversarial=shown.adversarial[:, :1])
    drawn = [[axes.images[0].get_array() for axes in draw_image_grid(each).axes] for each in (shown, gray)]
    assert all(np.array_equal(a, b) for a, b in zip(*drawn)) and drawn[1][0].shape == (6, 6, 3)


def test_steps_are_the_ticks_of_a_logarithmic_axis():
    (axes,) = draw_lines([Line('a', [1, 2, 50], [3, 2, 1])], 't', 'steps', 'RA', log_x=True).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ['1', '2', '50']


def test_loads_keep_their_scale_and_tell_their_numbers():
    load = np.array([[0.25, 0.75], [np.nan, np.nan]])
    figure = draw_loads({'clean': load, 'under attack': load}, ['cat', 'dog'], 'load')
    clean = figure.axes[0]
    (picture,) = clean.get_images()
    assert picture.get_clim() == (0, 1)
    assert np.array_equal(np.ma.filled(picture.get_array(), np.nan), load, equal_nan=True)
    assert [text.get_text() for text in clean.texts] == ['25%', '75%']
    assert [label.get_text() for label in clean.get_yticklabels()] == ['cat', 'dog']
    # One image of 200 would read 0%.
    seldom = draw_loads({'': np.array([[0.005, 0.25, 0.745]])}, ['cat'], 'load').axes[0]
    assert [text.get_text() for text in seldom.texts] == ['25%', '74%']


def test_loads_of_a_thousand_classes_stay_small():
    load = np.full((1000, 8), 1 / 8)
    figure = draw_loads({'clean': load}, [str(n) for n in range(1000)], 'load')
    assert figure.get_size_inches()[1] <= 9
    assert not figure.axes[0].texts


def test_confusion_is_sorted_by_group_and_framed():
    confusion = np.array([[3, 0, 1], [0, 4, 0], [2, 0, 2]])
    axes = draw_confusion(confusion, [[0, 2], [1]], ['cat', 'car', 'dog'], 'title').axes[0]
    (picture,) = axes.get_images()
    assert picture.get_array().tolist() == [[0.75, 0.25, 0], [0.5, 0.5, 0], [0, 0, 1]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ['cat', 'dog', 'car']
    assert [(box.get_x(), box.get_width()) for box in axes.patches] == [(-0.5, 2), (1.5, 1)]
    many = draw_confusion(np.eye(100), [list(range(100))], [str(n) for n in range(100)], 'title').axes[0]
    assert not many.texts and not many.get_yticklabels()
    with pytest.raises(ValueError, match='do not hold each of 3 classes once'):
        draw_confusion(confusion, [[0, 1]], ['cat', 'car', 'dog'], 'title')


def test_parts_fill_the_bar():
    (axes,) = draw_parts({'one': dict(robust=1, lost=3), 'two': dict(robust=2, lost=2)}, 'title', 'images').axes
    assert [bar.get_width() for bar in axes.patches] == [25, 50, 75, 50]
    assert [text.get_text() for text in axes.texts] == ['25%', '50%', '75%', '50%']
    assert len({bar.get_hatch() for bar in axes.patches}) == 2


def test_the_grid_says_what_became_of_each_image():
    told = draw_image_grid(
        examples([0, 1], [0, 1], [2, 1], [[0], [1]], [[1], [1]]), ['cat', 'dog', 'a name that is much too long'], 'pgd'
    )
    titles = [axes.get_title() for axes in told.axes]
    assert titles[:2] == ['is cat\nseen: cat\nexpert 0', 'is dog\nseen: dog\nexpert 1']
    assert titles[2:4] == ['wrong\nseen: a name that…\nexpert 1', 'right\nseen: dog\nexpert 1']
    assert [axes.get_ylabel() for axes in told.axes[::2]] == ['clean', 'pgd', 'change (±0.1)']


def test_the_grid_counts_decisions_that_moved():
    told = draw_image_grid(examples([0], [0], [0], [[0, 1, 1]], [[0, 0, 0]]))
    assert told.axes[0].get_title().endswith('3 choices')
    assert told.axes[1].get_title().endswith('2 of 3 moved')


def test_half_of_the_images_are_fooled_if_so_many_are():
    label = list(range(10))
    some = examples(label, [0, 1, 2, 3, 4, 5, 6, 7, 8, 0], [9, 9, 9, 9, 4, 5, 6, 7, 8, 0])
    assert some.telling(4).label.tolist() == [0, 1, 4, 5]
    assert some.telling(10).label.tolist() == label
    assert examples(label, label, label).telling(4).label.tolist() == [0, 1, 2, 3]
    assert examples(label, label, [1] * 10).telling(4).label.tolist() == [0, 2, 3, 1]
    assert examples([0, 1], [1, 1], [1, 1]).telling(4).label.tolist() == [1, 0]


@pytest.mark.parametrize(
    'tokens, height, width, expected',
    [(17, 8, 8, (1, 4, 4)), (16, 8, 8, (0, 4, 4)), (198, 224, 224, (2, 14, 14)), (33, 8, 16, (1, 4, 8))],
)
def test_tokens_find_their_patches(tokens, height, width, expected):
    assert patch_grid(tokens, height, width) == expected


def test_tokens_that_are_no_patches_are_refused():
    with pytest.raises(ValueError, match='7 tokens make no grid'):
        patch_grid(7, 8, 16)


def test_patches_wear_their_expert_and_those_that_moved_a_frame():
    before, after = np.array([3, 0, 1, 2, 3]), np.array([3, 0, 1, 1, 3])
    image = np.zeros((4, 4, 3))
    figure = draw_patch_routes(image, image, [before], [after], 4, ['ffn'])
    clean, attacked = figure.axes
    assert [text.get_text() for text in clean.texts] == ['0', '1', '2', '3']
    frames = [patch for patch in attacked.patches if not patch.get_fill()]
    assert [(round(frame.get_x()), round(frame.get_y())) for frame in frames] == [(0, 1)]
    assert all(isinstance(patch, Rectangle) for patch in clean.patches)
    assert attacked.get_title() == 'attacked: 1 of 5 tokens moved'


def test_training_in_turns_has_a_chart_for_each_turn():
    points = [(1, 1.0), (2, 0.5)]
    names = [
        'experts/loss',
        'experts/loss_natural',
        'experts/loss_robust',
        'router/loss',
        'router/loss_balance',
        'experts.lr',
        'router.lr',
        'clean/accuracy/top1',
        'worst/accuracy/top1',
        'router/share_clean_0',
        'router/share_adversarial_0',
        'router/route_changed',
        'pgd/route_changed',
        'time',
    ]
    charts = draw_training({name: points for name in names})
    labels = {name: [line.get_label() for line in chart.axes[0].get_lines()] for name, chart in charts.items()}
    assert labels == {
        'losses_experts': ['loss', 'natural', 'robust'],
        'losses_router': ['balance'],
        'validation': ['clean', 'worst'],
        'route_changes': ['in training', 'validation, pgd'],
        'load': ['expert 0, clean', 'expert 0, attacked'],
        'learning_rates': ['experts', 'router'],
    }
    (changed, _) = charts['route_changes'].axes[0].get_lines()
    assert list(changed.get_ydata()) == [100, 50]
    for chart in draw_training({name: points for name in names}, selected=2).values():
        mark = chart.axes[0].get_lines()[-1]
        assert (mark.get_label(), list(mark.get_xdata())) == ('the checkpoint', [2, 2])


def test_joint_training_of_a_dense_model_has_losses_and_rates():
    points = [(1, 1.0)]
    charts = draw_training({'loss': points, 'loss_a': points, 'loss_b': points, 'lr': points, 'accuracy/top1': points})
    assert list(charts) == ['losses', 'validation', 'learning_rates']


def test_files_are_the_same_each_time_whatever_the_user_has_set(tmp_path, monkeypatch):
    def figure():
        return draw_lines([Line('a', [0, 1], [1, 2])], 'title', 'x', 'y')

    plain = png_bytes(figure())
    with matplotlib.rc_context({'axes.grid': False, 'font.size': 20}):
        assert png_bytes(figure()) == plain
    pixels = save_png(figure(), str(tmp_path / 'new' / 'figure.png'))
    assert (tmp_path / 'new' / 'figure.png').read_bytes() == plain
    assert pixels.shape == np.asarray(Image.open(io.BytesIO(plain)).convert('RGB')).shape
    monkeypatch.chdir(tmp_path)
    save_png(figure(), 'x.png')
    assert (tmp_path / 'x.png').read_bytes() == plain


def test_texts_from_data_are_no_formulas():
    bad = r'$\frac{$'
    line, load = Line(bad, [1, 20], [1, 900]), np.array([[0.5, 0.5]])
    image = np.zeros((4, 4, 3))
    choice = np.array([0, 1, 1, 0])
    figures = [
        draw_lines([line], bad, bad, bad, log=True, log_x=True),
        draw_parts({bad: {bad: 1, 'other': 1}}, bad, bad),
        draw_loads({bad: load}, [bad], bad),
        draw_image_grid(examples([0], [0], [0]), [bad], bad),
        draw_patch_routes(image, image, [choice], [choice], 2, [bad]),
        draw_training(
            {f'{bad}/accuracy/top1': [(1, 1.0)], f'{bad}.lr': [(1, 1.0)], f'{bad}/route_changed': [(1, 1.0)]}
        ),
    ]
    for figure in [*figures[:-1], *figures[-1].values()]:
        assert png_bytes(figure).startswith(b'\x89PNG')
