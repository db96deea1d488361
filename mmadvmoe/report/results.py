"""The results of one model, read from its folder of a report.

The folder holds what the tools of this package write, each file whole or not there::

    model.json        the model: config, checkpoint, cost
    evaluation/       from tools/test.py --out
    dissection.json   from tools/analysis_tools/dissect_robustness.py --out
    soundness.json    from tools/analysis_tools/check_attacks.py --out
    curve.json        accuracy over the size of the ball, where soundness.json, which has it too, is not
    examples.npz      attacked images
    training.json     scalars of the training run

Letters: B images, T tokens of an image in a layer.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmadvmoe.evaluation import Examples, RobustOutcomes, read_evaluation
from mmadvmoe.evaluation.folder import read_metrics
from mmadvmoe.utils import write_atomically

#: Where each part lies in the folder of a model. The last file of an evaluation says that it is complete.
PARTS = dict(
    evaluation='evaluation/metrics.json',
    dissection='dissection.json',
    soundness='soundness.json',
    curve='curve.json',
    examples='examples.npz',
)
MODEL, RUN, TRAINING = 'model.json', 'evaluation/run.json', 'training.json'
OUTCOMES = 'evaluation/outcomes.jsonl'
_TOOL = (
    'config checkpoint num_images seed seconds sa routing? num_experts threat_model.norm threat_model.eps '
    'threat_model.alpha threat_model.steps class_names.* '
)
#: What sections read of each file, as paths of keys: ``*`` stands for all keys or items, and what is marked with ``?``
#: may be None or empty; what is marked with ``??`` may also be missing, for it is not in files of older versions.
_CONTENT = {
    MODEL: 'name config checkpoint checkpoint_sha256 work_dir config_text class_names.* num_experts routers.* '
    'cost.params_total cost.params_active cost.pathway_gflops cost.router_gflops',
    PARTS['evaluation']: '',
    RUN: 'settings.model.sha256 settings.data.num_images settings.attacks.* settings.survivors_only.* '
    'settings.worst_of.* versions.python',
    PARTS['dissection']: _TOOL + 'routers.* attacks.*.ra attacks.*.route_changed attacks.*.table.kept.kept '
    'attacks.*.table.kept.flipped attacks.*.table.changed.kept attacks.*.table.changed.flipped failures?.standing '
    'failures?.experts failures?.router experts.*.expert experts.*.sa experts.*.ra best_expert?.sa best_expert?.ra '
    'load?.clean.per_class load?.clean.per_layer load?.end_to_end.per_class load?.end_to_end.per_layer '
    'flips_by_margin??.*.margin_mean flips_by_margin??.*.changed',
    PARTS['soundness']: _TOOL + 'checks.*.title checks.*.status checks.*.message num_warnings curves.eps.*.eps '
    'curves.eps.*.ra curves.steps.*.steps curves.steps.*.ra',
    PARTS['curve']: 'num_images threat_model.norm threat_model.eps threat_model.alpha threat_model.steps '
    'curves.eps.*.eps curves.eps.*.ra',
    TRAINING: '*.*',
}
_ARRAYS = tuple(array.name for array in fields(Examples))


class DamagedFileError(ValueError):
    """A file is not what its name says; the message names the file, what is wrong with it and what to do."""


@dataclass(frozen=True, eq=False)
class SavedExamples:
    """Attacked images.

    Attributes:
        examples: The images, predictions and routes.
        attack: Name of the attack.
        patches_before, patches_after: For routers of tokens, the first choice of each token, (B, T) for each layer,
            without and with the attack; else empty.
    """

    examples: Examples
    attack: str
    patches_before: tuple[np.ndarray, ...] = ()
    patches_after: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True, eq=False)
class ModelResults:
    """All that is known of one model; what is not there, or is damaged, is None.

    Attributes:
        name: Its name in the report.
        model: Content of ``model.json``.
        metrics: Metrics of robust evaluation, as :class:`~mmadvmoe.evaluation.RobustTestLoop` names them.
        outcomes: Those of its images.
        run: Settings and versions of that evaluation.
        dissection, soundness, curve: Content of these files.
        examples: Attacked images.
        scalars: Points ``(iteration, value)`` of each scalar of the training run; empty where there is no log of it.
        damaged: For each damaged file, a sentence that names it and the cure.
    """

    name: str
    model: Mapping[str, Any] | None = None
    metrics: Mapping[str, float] | None = None
    outcomes: RobustOutcomes | None = None
    run: Mapping[str, Any] | None = None
    dissection: Mapping[str, Any] | None = None
    soundness: Mapping[str, Any] | None = None
    curve: Mapping[str, Any] | None = None
    examples: SavedExamples | None = None
    scalars: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    damaged: Sequence[str] = ()


def read_results(folder: Path, damaged: Sequence[str] = ()) -> ModelResults:
    """Read the folder of a model. Damaged parts are left out and noted, beside what is known to be ``damaged``.

    Raises:
        FileNotFoundError: It holds no ``model.json``.
        DamagedFileError: ``model.json`` is damaged.
    """
    if not (folder / MODEL).is_file():
        raise FileNotFoundError(f'{folder} holds no results of a model: {MODEL} is missing')
    model, faults = read_json(folder, MODEL), list(damaged)

    def part(name: str, read: Callable[[Path, str], Any] = read_json) -> Any:
        try:
            return read(folder, name) if (folder / name).is_file() else None
        except (ValueError, OSError) as error:
            faults.append(str(error))
            return None

    return ModelResults(
        name=model['name'],
        model=model,
        metrics=part(PARTS['evaluation'], _read_metrics),
        outcomes=part(OUTCOMES, lambda folder, name: read_evaluation((folder / name).parent).outcomes),
        run=part(RUN),
        dissection=part(PARTS['dissection']),
        soundness=part(PARTS['soundness']),
        curve=part(PARTS['curve']),
        examples=part(PARTS['examples'], lambda folder, name: load_examples(folder / name)),
        scalars=part(TRAINING) or {},
        damaged=faults,
    )


def read_json(folder: Path, name: str) -> dict:
    """Read one of the JSON files of a model, and check that it holds what sections read.

    Raises:
        DamagedFileError: It does not.
    """
    file = folder / name
    # Without metrics.json an evaluation goes on from its own files, and without model.json nothing says whose they are.
    cure = f'remove {file.parent if name in (MODEL, RUN) else "it"} to have it made anew'
    try:
        content = json.loads(file.read_text(encoding='utf-8'))
    except ValueError as error:
        raise DamagedFileError(f'{file} is damaged ({error}); {cure}') from None
    kind = Path(name).stem if name in (PARTS['dissection'], PARTS['soundness'], PARTS['curve']) else None
    if isinstance(content, dict) and kind not in (None, content.get('kind')):
        raise DamagedFileError(f'{file} holds kind={content.get("kind")!r}, not {kind!r}; {cure}')
    lacking = [path for path in _CONTENT[name].split() if _lacks(content, path.split('.'))]
    if lacking or not isinstance(content, dict):
        raise DamagedFileError(f'{file} is damaged (it lacks {", ".join(lacking) or "an object"}); {cure}')
    return content


def _lacks(content: Any, path: Sequence[str]) -> bool:
    """Whether content has nothing at a path; see ``_CONTENT``."""
    if not path:
        return content is None
    name, *rest = path
    if name == '*' and isinstance(content, (dict, list)):
        return any(_lacks(each, rest) for each in (content.values() if isinstance(content, dict) else content))
    if not isinstance(content, dict) or name.rstrip('?') not in content:
        return not (isinstance(content, dict) and name.endswith('??'))
    inner = content[name.rstrip('?')]
    return bool(inner or not name.endswith('?')) and _lacks(inner, rest)


def _read_metrics(folder: Path, name: str) -> dict[str, float]:
    """The metrics that are single numbers; others are not shown."""
    read_metrics((folder / name).parent)
    return {key: value for key, value in read_json(folder, name).items() if isinstance(value, Real)}


def save_examples(path: Path, saved: SavedExamples) -> None:
    """Write the file at once or not at all."""
    content = {name: getattr(saved.examples, name).numpy() for name in _ARRAYS}
    content['attack'] = np.array(saved.attack)
    for view in ('before', 'after'):
        for layer, choice in enumerate(getattr(saved, f'patches_{view}')):
            content[f'patches_{view}_{layer}'] = choice
    file = io.BytesIO()
    np.savez_compressed(file, **content)
    write_atomically(path, file.getvalue())


def load_examples(path: Path) -> SavedExamples:
    """Read the file; nothing in it is executed.

    Raises:
        DamagedFileError: An array is missing or does not fit the others, or the file is something else.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            content = dict(file)
        layers = range(sum(name.startswith('patches_before_') for name in content))
        saved = SavedExamples(
            Examples(**{name: torch.from_numpy(content[name]) for name in _ARRAYS}),
            str(content['attack']),
            *(tuple(content[f'patches_{view}_{layer}'] for layer in layers) for view in ('before', 'after')),
        )
        examples = saved.examples
        if examples.images.dim() != 4 or examples.images.shape != examples.adversarial.shape:
            raise ValueError('the images are of other shapes than the attacked images')
        patches = (*saved.patches_before, *saved.patches_after)
        if {len(array) for array in (*(content[name] for name in _ARRAYS), *patches)} != {len(examples)}:
            raise ValueError('the arrays are not of the same images')
    except Exception as error:  # a damaged archive can fail in any way
        raise DamagedFileError(f'{path} is damaged ({error}); remove it to have it made anew') from None
    return saved
