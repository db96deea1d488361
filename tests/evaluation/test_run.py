"""What the log says while an evaluation runs."""

import pytest
import torch

from mmadvmoe.evaluation import CLEAN, Outcome, RobustOutcomes
from mmadvmoe.evaluation.run import EvaluationProgress


def _chunk(standing: dict[str, int], size: int = 4) -> RobustOutcomes:
    """Images of class 0, of which the first few are right under each attack."""
    by_name = {}
    for name, count in standing.items():
        logits = torch.eye(2)[(torch.arange(size) >= count).long()]
        nothing = torch.zeros(size, 0, dtype=torch.int64)
        by_name[name] = Outcome(logits, nothing, torch.zeros(size, 3), torch.ones(size, dtype=torch.bool))
    return RobustOutcomes(torch.arange(size), torch.zeros(size, dtype=torch.int64), by_name)


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr('mmadvmoe.evaluation.run.print_log', lambda message, logger: found.append(message))
    return found


def test_images_accuracy_and_time_left(messages: list[str]) -> None:
    now = [0.0]
    progress = EvaluationProgress(['pgd', 'auto'], num_images=12, num_chunks=3, clock=lambda: now[0])

    def report(name: str, seconds: float, **standing: int) -> None:
        now[0] += seconds
        progress.report(name, _chunk({CLEAN: 4, **standing}), seconds)

    report(CLEAN, 1.0)
    report('pgd', 4.0, pgd=3)
    assert progress.seconds_left() is None and messages == []
    report('auto', 30.0, pgd=3, auto=1)
    assert progress.seconds_left() == pytest.approx(2 * 35.0)
    assert messages == ['Robust evaluation: 4 of 12 images, robust accuracy so far 25.00, 0:01:10 left']
    report(CLEAN, 1.0)
    report('pgd', 10.0, pgd=2)
    assert messages[1:] == [
        'Robust evaluation: 4 of 12 images, robust accuracy so far 25.00, of the next 4 images 2 are robust after '
        "'pgd', 0:01:08 left"
    ]
    report('auto', 1.0, pgd=2, auto=2)
    assert len(messages) == 2
    report(CLEAN, 0.0)
    report('pgd', 0.0, pgd=4)
    report('auto', 0.0, pgd=4, auto=4)
    # The end is told whenever it comes.
    assert messages[2:] == ['Robust evaluation: 12 of 12 images, robust accuracy so far 58.33']


def test_outcomes_from_disk_say_nothing_about_time(messages: list[str]) -> None:
    progress = EvaluationProgress(['pgd'], num_images=8, num_chunks=2, clock=lambda: 0.0)
    progress.report(CLEAN, _chunk({CLEAN: 4}), None)
    progress.report('pgd', _chunk({CLEAN: 4, 'pgd': 2}), None)
    assert progress.seconds_left() is None
    progress.report(CLEAN, _chunk({CLEAN: 4}), 1.0)
    progress.report('pgd', _chunk({CLEAN: 4, 'pgd': 4}), 5.0)
    assert progress.seconds_left() == 0 and messages[-1].endswith('8 of 8 images, robust accuracy so far 75.00')
