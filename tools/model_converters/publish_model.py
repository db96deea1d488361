"""Put the weights of a trained model into the zoo: without optimizer and logs, with checksum, revision and metrics.

Writes zoo/NAME-SHA8.pth and its entry in zoo/weights.json, and takes earlier weights of the same config away; then
run tools/analysis_tools/metafiles.py.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
from pathlib import Path

import torch

from mmadvmoe.apis import load_robust_model
from mmadvmoe.runtime.launch import load_config
from mmadvmoe.runtime.safe_load import load_from_local
from mmadvmoe.utils import write_atomically

ROOT = Path(__file__).resolve().parents[2]
ZOO = ROOT / 'zoo'
#: Weights that come with every installation are small.
MAX_BYTES = 4_000_000


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', type=Path, help='config of the model')
    parser.add_argument('checkpoint', type=Path, help='checkpoint of the run')
    parser.add_argument('metrics', type=Path, help='what tools/test.py --out-item metrics has written of it, as JSON')
    parser.add_argument('--revision', help='commit that trained and tested it [that of the checkout]')
    parser.add_argument('--zoo', type=Path, default=ZOO, help='[%(default)s]')
    return parser.parse_args()


def publish(config: Path, checkpoint: Path, metrics: Path, revision: str, zoo: Path = ZOO) -> Path:
    """Write the weights and their entry; the file of the weights.

    Raises:
        ValueError: The weights are too large for an installation, or the metrics are none.
        CheckpointError: They do not fit the config.
    """
    accuracies = {
        name.removesuffix('/accuracy/top1'): round(value, 2)
        for name, value in json.loads(metrics.read_text(encoding='utf-8')).items()
        if name.endswith('/accuracy/top1')
    }
    if not accuracies or not all(0 <= value <= 100 for value in accuracies.values()):
        raise ValueError(f'{metrics} holds no accuracies in percent, as tools/test.py --out-item metrics writes them')
    weights = load_robust_model(config, checkpoint).classifier.state_dict()
    # That of the run, which an option may have set; a file of weights alone does not tell.
    of_config = load_config(config).get('randomness', {}).get('seed')
    seed = load_from_local(str(checkpoint), 'cpu').get('meta', {}).get('seed', of_config)
    file = io.BytesIO()
    torch.save(dict(meta={}, state_dict=weights), file)
    content = file.getvalue()
    if len(content) > MAX_BYTES:
        raise ValueError(f'{checkpoint} has {len(content):,} bytes of weights, more than {MAX_BYTES:,}')
    sha256 = hashlib.sha256(content).hexdigest()
    zoo.mkdir(exist_ok=True)
    path, index = zoo / f'{config.stem}-{sha256[:8]}.pth', zoo / 'weights.json'
    entries = json.loads(index.read_text(encoding='utf-8')) if index.is_file() else {}
    old = entries.get(config.stem)
    write_atomically(path, content)
    entries[config.stem] = dict(file=path.name, sha256=sha256, revision=revision, seed=seed, metrics=accuracies)
    write_atomically(index, (json.dumps(dict(sorted(entries.items())), indent=2) + '\n').encode())
    if old is not None and old['file'] != path.name:
        (zoo / old['file']).unlink(missing_ok=True)
    return path


def head() -> str:
    """The commit of the checkout."""
    command = ['git', 'describe', '--always', '--dirty', '--abbrev=12', '--exclude=*']
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    args = parse_args()
    print(publish(args.config, args.checkpoint, args.metrics, args.revision or head(), args.zoo))


if __name__ == '__main__':
    main()
