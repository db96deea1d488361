"""What TensorBoard shows of a training run in turns, read back from its event files."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_images_hook import PGD, cfg_with, hook
from tiny_runs import build_runner

EPOCHS, ITERATIONS = 2, 8


@pytest.fixture(scope='module')
def events(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tensorboard')
    backends = [dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')]
    cfg = cfg_with(
        folder,
        dict(type='RouterHealthHook'),
        hook(),
        epochs=EPOCHS,
        visualizer=dict(type='UniversalVisualizer', vis_backends=backends),
    )
    cfg.val_cfg.attacks['routepgd'] = dict(PGD, type='RoutePGD')
    build_runner(cfg).train()
    (run,) = folder.glob('*/vis_data')
    accumulator = EventAccumulator(str(run))
    accumulator.Reload()
    return accumulator


@pytest.mark.parametrize(
    'tag',
    [
        'clean/accuracy/top1',
        'pgd/accuracy/top1',
        'routepgd/accuracy/top1',
        'worst/accuracy/top1',
        'pgd/route_changed',
        'routepgd/route_changed',
        'clean/expert_share/0',
        'pgd/expert_share/1',
    ],
)
def test_each_validation_is_there_at_its_epoch(events, tag):
    assert [event.step for event in events.Scalars(tag)] == [1, 2]


@pytest.mark.parametrize('tag', ['router/share_clean_0', 'router/share_adversarial_1', 'router/route_changed'])
def test_routes_in_training_are_there_at_the_last_iteration_of_each_epoch(events, tag):
    assert [event.step for event in events.Scalars(tag)] == [4, 8]


@pytest.mark.parametrize('tag', ['experts/loss', 'router/loss', 'experts.lr', 'router.lr'])
def test_both_turns_are_there(events, tag):
    assert events.Scalars(tag)[-1].step == ITERATIONS


def test_shares_sum_to_one_and_robust_is_at_most_clean(events):
    values = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()['scalars']}
    for view in ('clean', 'pgd'):
        assert sum(values[f'{view}/expert_share/{n}'] for n in range(2)) == pytest.approx(1)
    worst = min(values[f'{name}/accuracy/top1'] for name in ('clean', 'pgd', 'routepgd'))
    assert values['worst/accuracy/top1'] <= worst


def test_pictures_are_there_at_their_epochs(events):
    pictures = events.Images('adversarial_images')
    assert [picture.step for picture in pictures] == [1, 2]
    assert pictures[0].width > pictures[0].height / 4
