"""The results of one model, read from its folder of a report.

The folder holds what the tools of this package write, each file whole or not there::

    model.json        what the model is: config, checkpoint, cost
    evaluation/       from tools/test.py --out
    dissection.json   from tools/analysis_tools/dissect_robustness.py --out
    soundness.json    from tools/analysis_tools/check_attacks.py --out
    examples.npz      attacked images
    training.json     scalars of the training run
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from .saved_examples import SavedExamples, load_examples

#: Where each part lies in the folder of a model. The last file of an evaluation says that it is complete.
PARTS = dict(
    evaluation='evaluation/metrics.json',
    dissection='dissection.json',
    soundness='soundness.json',
    examples='examples.npz',
)
MODEL = 'model.json'
TRAINING = 'training.json'


@dataclass(frozen=True)
class ModelResults:
    """All that is known of one model; what is not there is None.

    Attributes:
        name: What the model is called.
        model: Content of ``model.json``.
        metrics: Metrics of robust evaluation, as :class:`~mmadvmoe.evaluation.RobustTestLoop` names them.
        run: Settings and versions of that evaluation.
        dissection, soundness: Content of these files.
        examples: Attacked images.
        scalars: Points ``(iteration, value)`` of each scalar of the training run; empty where there is no log of it.
    """

    name: str
    model: Mapping[str, Any]
    metrics: Optional[Mapping[str, float]]
    run: Optional[Mapping[str, Any]]
    dissection: Optional[Mapping[str, Any]]
    soundness: Optional[Mapping[str, Any]]
    examples: Optional[SavedExamples]
    scalars: Mapping[str, Sequence[tuple[int, float]]]


def read_results(folder: Path) -> ModelResults:
    """Read the folder of a model.

    Raises:
        FileNotFoundError: It holds no ``model.json``.
        ValueError: A file is not what its name says.
    """
    model = _read(folder / MODEL)
    if model is None:
        raise FileNotFoundError(f'{folder} holds no results of a model: {MODEL} is missing')
    examples = folder / PARTS['examples']
    return ModelResults(
        name=model['name'],
        model=model,
        metrics=_read(folder / PARTS['evaluation']),
        run=_read(folder / 'evaluation' / 'run.json'),
        dissection=_read(folder / PARTS['dissection'], 'dissection'),
        soundness=_read(folder / PARTS['soundness'], 'soundness'),
        examples=load_examples(examples) if examples.is_file() else None,
        scalars=_read(folder / TRAINING) or {},
    )


def _read(file: Path, kind: Optional[str] = None) -> Optional[dict]:
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding='utf-8'))
    except json.JSONDecodeError as error:
        raise ValueError(f'{file} is damaged ({error}); remove it to have it made anew') from None
    if kind is not None and content.get('kind') != kind:
        raise ValueError(f'{file} holds kind={content.get("kind")!r}, not {kind!r}; remove it to have it made anew')
    return content
