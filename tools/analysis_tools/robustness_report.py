"""Make one HTML page on the robustness of one or several models, with the pictures and numbers behind it.

What is missing is measured first, by tools/test.py, dissect_robustness.py and check_attacks.py; what is there is kept,
so that a report which was interrupted goes on where it was. docs/report.md tells what lies where.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from mmadvmoe.report import (
    PARTS,
    ModelResults,
    describe_model,
    make_curve,
    make_examples,
    read_results,
    slug,
    write_report,
)
from mmadvmoe.report.results import RUN

TOOLS = Path(__file__).resolve().parents[1]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out_dir', type=Path, help='folder of the report')
    parser.add_argument(
        '--model',
        nargs=3,
        action='append',
        required=True,
        metavar=('NAME', 'CONFIG', 'CHECKPOINT'),
        help='a model and its name in the report; to be given once for each. The training log is looked for beside '
        'the checkpoint',
    )
    parser.add_argument(
        '--measure',
        nargs='*',
        choices=tuple(PARTS),
        default=tuple(PARTS),
        help='the parts to measure where they are missing; without a name, none [all]',
    )
    parser.add_argument(
        '--attacks',
        nargs='+',
        metavar='NAME',
        help="attacks of the evaluation, as tools/test.py names them [the config's]",
    )
    parser.add_argument(
        '--num-images', type=int, metavar='M', help='images to dissect and to check the attacks on [as these tools say]'
    )
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='[%(default)s]')
    args = parser.parse_args()
    slugs = [slug(name) for name, _, _ in args.model]
    if not all(slugs) or len(set(slugs)) < len(slugs):
        parser.error(f'--model: each name needs letters or digits of its own, but they give the folders {slugs}')
    return args


class MeasurementError(RuntimeError):
    """A part of a model could not be measured."""


def measure(part: str, folder: Path, config: str, checkpoint: str, args: argparse.Namespace) -> None:
    """Measure one part of a model.

    Raises:
        MeasurementError: It failed.
    """
    out = folder / PARTS[part]
    try:
        if part == 'examples':
            return make_examples(folder, args.device)
        if part == 'curve':
            return make_curve(folder, args.device, args.num_images)
    except Exception as error:  # whatever a data set or a network of the user may raise
        raise MeasurementError(f'{part} failed: {type(error).__name__}: {error}') from error
    if part == 'evaluation':
        options = ['--out', out.parent] + (['--attacks', *args.attacks] if args.attacks else [])
        command = [TOOLS / 'test.py', config, checkpoint, '--work-dir', folder / 'log', *options]
    else:
        tool = dict(dissection='dissect_robustness.py', soundness='check_attacks.py')[part]
        options = ['--out', out, '--device', args.device]
        options += ['--num-images', args.num_images] if args.num_images is not None else []
        command = [TOOLS / 'analysis_tools' / tool, config, checkpoint, *options]
    env = dict(os.environ)
    if part == 'evaluation' and args.device == 'cpu':
        env['CUDA_VISIBLE_DEVICES'] = ''  # tools/test.py, as MMEngine, takes a GPU where it sees one
    if subprocess.run([sys.executable, *map(str, command)], check=False, env=env).returncode:
        raise MeasurementError(f'{part} failed, for the reason above: {" ".join(map(str, command))}')


def made_otherwise(part: str, folder: Path, args: argparse.Namespace) -> list[str]:
    """A sentence where a part that is there was not made as ``--attacks`` or ``--num-images`` say now."""
    file = folder / (RUN if part == 'evaluation' else PARTS[part])
    try:
        content = json.loads(file.read_text(encoding='utf-8'))
        if part == 'evaluation':
            found, asked = sorted(content['settings']['attacks']), args.attacks and sorted(args.attacks)
            same = not asked or set(asked) <= set(found)
        else:
            found, asked = content['num_images'], args.num_images
            same = asked is None or found <= asked  # a data set may have fewer
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return []  # an archive of pictures, or damaged, which those who read it say
    return [] if same else [f'{file} is of {found}, and {asked} is asked for: remove it, and it is measured anew']


def collect(name: str, config: str, checkpoint: str, args: argparse.Namespace, failures: list[str]) -> ModelResults:
    """Measure what is missing of a model, adding to ``failures`` what could not be, and read what is there."""
    folder, before = args.out_dir / slug(name), len(failures)
    try:
        damaged = describe_model(folder, name, config, checkpoint)
    except (ValueError, OSError) as error:
        # Nothing is measured into a folder of which nothing says whose it is; the other models are.
        failures.append(f'{name}: {error}')
        return ModelResults(name, damaged=[str(error)])
    for part in args.measure:
        # The checks of the attacks have a curve, too.
        same = ('curve', 'soundness') if part == 'curve' else (part,)
        if any((folder / PARTS[each]).is_file() for each in same):
            print(f'==> {name}: {part} is there', flush=True)
            failures += made_otherwise(part, folder, args)
        else:
            print(f'==> {name}: {part}', flush=True)
            try:
                measure(part, folder, config, checkpoint, args)
            except MeasurementError as error:
                # The other parts and models are measured all the same.
                failures.append(str(error))
    return read_results(folder, [*damaged, *failures[before:]])


def main() -> None:
    args = parse_args()
    failures: list[str] = []
    models = [collect(*model, args, failures) for model in args.model]
    for model in models:
        for sentence in model.damaged:
            print(f'==> {model.name}: {sentence}')
    print(f'==> {write_report(args.out_dir, models)}')
    if failures:
        sys.exit(1)


if __name__ == '__main__':
    main()
