"""The scalars of a run, over all of its starts."""

import json

import pytest

from mmadvmoe.report.collect import read_training_log


def write(work_dir, start, *records, cut=''):
    file = work_dir / start / 'vis_data' / 'scalars.json'
    file.parent.mkdir(parents=True)
    file.write_text(''.join(json.dumps(record) + '\n' for record in records) + cut)


def train(iteration, epoch, loss):
    return {'loss': loss, 'epoch': epoch, 'iter': iteration, 'step': iteration}


def test_validations_get_the_iteration_before_them(tmp_path):
    write(
        tmp_path,
        '20260101_000000',
        train(19, 1, 2.0),
        {'router/entropy': 0.5, 'step': 19},
        train(38, 2, 1.0),
        {'router/entropy': 0.4, 'step': 38},
        {'clean/accuracy/top1': 90.0, 'clean/expert_share/0': 0.5, 'step': 2},
    )
    assert read_training_log(tmp_path) == {
        'loss': [(19, 2.0), (38, 1.0)],
        'router/entropy': [(19, 0.5), (38, 0.4)],
        'clean/accuracy/top1': [(38, 90.0)],
        'clean/expert_share/0': [(38, 0.5)],
    }


def test_a_later_start_replaces_what_was_done_again(tmp_path):
    write(tmp_path, '20260101_000000', train(10, 1, 3.0), train(20, 2, 2.0), train(30, 3, 1.0), cut='{"loss": 0.')
    write(tmp_path, '20260102_000000', train(20, 2, 2.5), train(30, 3, 1.5))
    assert read_training_log(tmp_path)['loss'] == [(10, 3.0), (20, 2.5), (30, 1.5)]


def test_a_validation_made_up_for_at_a_resume_stays_at_its_iteration(tmp_path):
    write(tmp_path, '20260101_000000', train(10, 1, 3.0))
    write(tmp_path, '20260102_000000', {'clean/accuracy/top1': 50.0, 'step': 1}, train(20, 2, 2.0))
    assert read_training_log(tmp_path)['clean/accuracy/top1'] == [(10, 50.0)]


def test_no_log_is_no_scalars(tmp_path):
    assert read_training_log(tmp_path) == {}


def test_a_damaged_line_is_named(tmp_path):
    write(tmp_path, '20260101_000000', cut='no json\n{"loss": 1.0, "step": 1, "iter": 1}\n')
    with pytest.raises(ValueError, match=r'scalars.json, line 1 is not JSON'):
        read_training_log(tmp_path)
