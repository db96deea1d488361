"""Write the table of what ``tools/gpu_table.sh`` has tested, as Markdown and as JSON lines, into its folder."""

import argparse
import json
import re
import statistics
from collections import defaultdict
from pathlib import Path

import torch

from mmadvmoe.evaluation.folder import read_metrics

COLUMNS = dict(SA='clean', PGD='pgd50', RoutePGD='routepgd50', RA='ra', AutoAttack='autoattack', worst='worst')
#: Rows by the name of their files, in their order.
NAMES = dict(
    at_dense='AT (Dense)',
    at_sdense='AT (S-Dense)',
    at_moe='AT (MoE)',
    advmoe_paper='AdvMoE (paper)',
    advmoe_reference='AdvMoE (reference)',
    advmoe_stabilised='AdvMoE (stabilised)',
    advmoe='AdvMoE',
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('folder', help='that of tools/gpu_table.sh')
    parser.add_argument('--device', default='cuda')
    parser.add_argument('--epochs', type=int, default=30, help='of each side, for the heading')
    return parser.parse_args()


def read(folder: Path) -> list[dict]:
    """One entry for each row and seed, in the order of the table: accuracies in per cent, and seconds of training."""
    found = []
    for name in NAMES:
        for path in sorted(folder.glob(f'outcomes_{name}_*')):
            seed = path.name.removeprefix(f'outcomes_{name}_')
            metrics = read_metrics(path) if seed.isdigit() else None
            if metrics is None:
                continue
            accuracies = {key: metrics.get(f'{attack}/accuracy/top1') for key, attack in COLUMNS.items()}
            log = folder / f'train_{name}_{seed}.done'
            seconds = re.findall(r'^(\d+) s$', log.read_text(encoding='utf-8'), re.MULTILINE) if log.exists() else []
            found.append(dict(row=name, seed=int(seed), train_seconds=sum(map(int, seconds)), **accuracies))
    return found


def markdown(entries: list[dict], device: str, epochs: int) -> str:
    """Means over seeds, with the range where there are several."""
    by_row = defaultdict(list)
    for entry in entries:
        by_row[entry['row']].append(entry)
    lines = [
        f'CIFAR-10 (JPEG), ResNet-18, r = 0.5, L-inf 8/255, {epochs} epochs for each side, {device}',
        '',
        '| | ' + ' | '.join([*COLUMNS, 'seeds', 'minutes']) + ' |',
        '| --- |' + ' ---: |' * (len(COLUMNS) + 2),
    ]
    for row, group in by_row.items():
        cells = [_cell([entry[key] for entry in group]) for key in COLUMNS]
        minutes = statistics.mean(entry['train_seconds'] for entry in group) / 60
        lines.append(f'| {NAMES[row]} | ' + ' | '.join([*cells, str(len(group)), f'{minutes:.1f}']) + ' |')
    return '\n'.join(lines) + '\n'


def _cell(values: list) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ''
    mean = f'{statistics.mean(known):.1f}'
    return mean if len(known) == 1 else f'{mean} ({min(known):.1f} to {max(known):.1f})'


def main() -> None:
    args = parse_args()
    folder = Path(args.folder)
    entries = read(folder)
    if not entries:
        raise SystemExit(f'{folder}: no row has been tested')
    device = torch.cuda.get_device_name() if args.device == 'cuda' else 'CPU'
    (folder / 'table.jsonl').write_text(''.join(json.dumps(dict(e, device=device)) + '\n' for e in entries))
    (folder / 'table.md').write_text(markdown(entries, device, args.epochs))
    print((folder / 'table.md').read_text())


if __name__ == '__main__':
    main()
