from dataclasses import replace

import pytest

from mmadvmoe.training.alternation import TurnSchedule

SCHEDULES = [
    TurnSchedule(),
    TurnSchedule(k_experts=3, k_router=2, warmup_iters=4),
    TurnSchedule(2, 1, 4, accumulative_counts=dict(experts=2, router=3)),
    TurnSchedule(warmup_iters=3, reuse_batch=True),
    TurnSchedule(reuse_batch=True, accumulative_counts=dict(experts=2, router=2)),
]


def groups_at(schedule, iteration):
    groups = [schedule.turn_at(iteration)]
    return groups + ['router'] if schedule.repeats_batch(iteration) else groups


@pytest.mark.parametrize('schedule', SCHEDULES, ids=str)
def test_counts_are_the_turns_taken_so_far(schedule):
    taken = dict(experts=0, router=0)
    for iteration in range(60):
        for group, count in taken.items():
            assert schedule.count_before(group, iteration) == count
        for group in groups_at(schedule, iteration):
            taken[group] += 1


def test_a_cycle_holds_the_asked_updates_of_each_group():
    schedule = TurnSchedule(3, 2, 4, accumulative_counts=dict(experts=2, router=3))
    order = ''.join(schedule.turn_at(i)[0] for i in range(4 + 2 * 12))
    assert order == 'eeee' + 2 * ('e' * 6 + 'r' * 6)


@pytest.mark.parametrize('schedule', SCHEDULES, ids=str)
def test_a_turn_never_ends_within_an_update(schedule):
    if schedule.reuse_batch:
        return  # one turn lasts one batch there, and both groups accumulate side by side
    for i in range(1, 60):
        group = schedule.turn_at(i - 1)
        if schedule.turn_at(i) != group:
            assert schedule.count_before(group, i) % schedule.accumulative_counts[group] == 0


@pytest.mark.parametrize(
    'wrong, key',
    [
        (dict(k_experts=0), 'k_experts=0'),
        (dict(k_router=-1), 'k_router=-1'),
        (dict(k_router=1.5), 'k_router=1.5'),
        (dict(k_router=True), 'k_router=True'),
        (dict(warmup_iters=-1), 'warmup_iters=-1'),
        (dict(k_experts=2, reuse_batch=True), 'k_experts=2'),
    ],
)
def test_wrong_values_are_named(wrong, key):
    with pytest.raises(ValueError, match=key):
        TurnSchedule(**wrong)


def test_accumulation_must_fit_the_schedule():
    with pytest.raises(ValueError, match='router.accumulative_counts=3 with reuse_batch'):
        replace(SCHEDULES[3], accumulative_counts=dict(experts=1, router=3))
    with pytest.raises(ValueError, match='warmup_iters=4 .* multiple of .*=3'):
        replace(SCHEDULES[1], accumulative_counts=dict(experts=3, router=1))
