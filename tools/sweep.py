"""Train and test configs with several seeds and settings; tools/compare.py makes tables and pictures of the results.

Each run trains, then tests its most robust checkpoint (on the images held out of training) as the config says. Every
finished run is one line of results.jsonl in the work directory and is not run again; a run that fails is a line, too. A
run that was interrupted goes on from its last checkpoint, or in the midst of its test. Arguments can be in a file, one
a line: @FILE.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ('torch', 'mmengine', 'mmpretrain', 'torchattacks', 'pyautoattack', 'numpy', 'scikit-learn')
BEST = 'best_worst_accuracy_top1_*.pth'
#: For what runs must not do at the same time.
LOCK = Lock()
#: The commands that are at work, which end with this one.
RUNNING: set[subprocess.Popen] = set()


class RunError(RuntimeError):
    """A command of a run failed; the message is the last line it wrote."""


class Interrupted(RuntimeError):
    """Somebody stopped a command of a run."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, fromfile_prefix_chars='@'
    )
    parser.add_argument('configs', nargs='+', metavar='[LABEL:]CONFIG', help='a config, and what to call it')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2, 3, 4], help='[0 1 2 3 4]')
    parser.add_argument(
        '--set',
        nargs='+',
        default=[],
        metavar='KEY=A,B',
        help='settings to try, each value with each value of the others; separate values that hold commas by ;',
    )
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help='settings of all runs')
    parser.add_argument('--jobs', type=int, default=2, help='runs at a time [2]')
    parser.add_argument('--threads', type=int, default=1, help='OMP_NUM_THREADS of each run [1]')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/sweep'), help='[%(default)s]')
    parser.add_argument('--retry-failed', action='store_true', help='run failed runs again')
    args = parser.parse_args()
    for config in args.configs:
        if not Path(split(config)[1]).is_file():
            parser.error(f'config {split(config)[1]!r} does not exist')
    for setting in args.set:
        if '=' not in setting:
            parser.error(f'--set {setting!r} must be KEY=A,B')
    return args


def split(config: str) -> tuple[str, str]:
    """Label and path of ``[LABEL:]CONFIG``; without a label it is the name of the file."""
    label, _, path = config.rpartition(':')
    return label or Path(path).stem, path


def grid(settings: Sequence[str]) -> list[list[str]]:
    """All combinations of ``KEY=A,B``: lists of ``KEY=VALUE``."""
    choices = []
    for setting in settings:
        key, values = setting.split('=', 1)
        choices.append([f'{key}={value}' for value in values.split(';' if ';' in values else ',')])
    return [list(combination) for combination in itertools.product(*choices)]


def identity(record: Mapping) -> tuple:
    """What makes a run: config, settings and seed."""
    return record['config'], tuple(record.get('settings', ())), record['seed']


def read(path: Path) -> list[dict]:
    """The runs so far; of a run that was repeated, the last line counts."""
    lines = path.read_text(encoding='utf-8').splitlines() if path.is_file() else []
    records = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            raise ValueError(f'{path}, line {number} is damaged: remove it, and its run is done again') from None
        records[identity(record)] = record
    return list(records.values())


def folder_of(config: str, settings: Sequence[str]) -> str:
    """Where the runs of a config with some settings are, one folder a seed."""
    return '_'.join([Path(config).stem, *settings]).replace('/', '-').replace(' ', '')


def begin(directory: Path, described: str) -> None:
    """Make the folder of a run that is described so; one that was begun otherwise is moved aside.

    Raises:
        FolderInUseError: A training writes to it.
    """
    from mmadvmoe.runtime.files import FolderLock

    lock = FolderLock(directory, 'Wait until that training ends, or choose another --work-dir.')
    new = not directory.exists()
    lock.acquire()
    begun = directory / 'run.json'
    # What another run left must not pass for a result of this one.
    if not new and not (begun.is_file() and begun.read_text(encoding='utf-8') == described):
        aside = directory.with_name(f'{directory.name}_until_{time.strftime("%Y%m%d_%H%M%S")}')
        directory.rename(aside)
        lock.path = aside / lock.path.name
        print(f'{directory} was begun otherwise, as its run.json says: it is {aside} now')
        directory.mkdir()
    begun.write_text(described, encoding='utf-8')
    lock.release()


def run(labelled: str, settings: list[str], seed: int, args: argparse.Namespace) -> dict:
    """Train and test one config with one seed; what happened, as a line of results.jsonl."""
    from mmadvmoe.evaluation.folder import read_metrics

    label, config = split(labelled)
    path = Path(config).resolve()
    directory = (args.work_dir / folder_of(config, settings) / f'seed_{seed}').resolve()
    record = dict(
        method=' '.join([label, *settings]),
        config=config,
        config_sha256=digest_of(config),
        settings=settings,
        seed=seed,
        cfg_options=args.cfg_options,
        revision=revision(),
        threads=args.threads,
        versions={package: version(package) for package in PACKAGES},
    )
    begin(directory, json.dumps(record))
    options = ['--cfg-options', f'randomness.seed={seed}', *args.cfg_options, *settings]
    try:
        try:
            cost = cost_of(config, options)
        except Exception as error:  # whatever building a network of the user may raise
            raise RunError(f'{type(error).__name__}: {error}') from error
        started = time.monotonic()
        train = ['train.py', path, '--work-dir', directory]
        if (directory / 'last_checkpoint').is_file():
            train.append('--resume')
            record['resumed'] = True  # the times are those since then
        processor = call([*train, *options], directory / 'train.out', args.threads)
        record['train_seconds'] = round(time.monotonic() - started, 1)
        record['train_processor_seconds'] = round(processor, 1)
        checkpoint = max(directory.glob(BEST), key=os.path.getmtime, default=None)
        if checkpoint is None:
            raise RunError(f'training left no {BEST}: does the config select by save_best?')
        record['checkpoint'] = checkpoint.name
        started = time.monotonic()
        outcomes = directory / 'outcomes' / checkpoint.stem
        command = ['test.py', path, checkpoint, '--work-dir', directory / 'test', '--out', f'{outcomes}{os.sep}']
        if outcomes.exists():
            record['test_resumed'] = True
        call([*command, *options], directory / 'test.out', args.threads)
        record['test_seconds'] = round(time.monotonic() - started, 1)
        record['metrics'] = read_metrics(outcomes)
        if record['metrics'] is None:
            raise RunError(f'{outcomes} holds no metrics: the test did not end')
    except (RunError, ValueError) as error:
        return dict(record, status='failed', error=str(error))
    return dict(record, status='done', cost=cost)


def digest_of(config: str) -> str:
    """What a config says, as a digest; one run at a time."""
    from mmengine.config import Config

    with LOCK:
        return hashlib.sha256(repr(Config.fromfile(config).to_dict()).encode()).hexdigest()


def cost_of(config: str, options: Sequence[str]) -> dict:
    """What one image costs, by a config and the options of a run; one run at a time."""
    from mmengine.config import DictAction

    from mmadvmoe.cost import count_cost
    from mmadvmoe.runtime.launch import load_config

    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    with LOCK:
        cfg = load_config(config)
        cfg.merge_from_dict(parser.parse_args(options).cfg_options)
        return asdict(count_cost(cfg))


def call(command: Sequence, output: Path, threads: int) -> float:
    """Run a tool beside this one, with what it writes at the end of a file; the processor time it took, in seconds.

    Raises:
        RunError: It failed.
    """
    env = dict(os.environ, OMP_NUM_THREADS=str(threads))
    with output.open('a') as file:
        process = subprocess.Popen(
            [sys.executable, *map(str, [ROOT / 'tools' / command[0], *command[1:]])],
            env=env,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        RUNNING.add(process)
        _, status, usage = os.wait4(process.pid, 0)
        RUNNING.discard(process)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode < 0:
        # Nothing is recorded of a run that was stopped from outside, so that the next call goes on with it.
        stop = Interrupted if -process.returncode in (signal.SIGINT, signal.SIGTERM) else RunError
        raise stop(f'killed by {signal.Signals(-process.returncode).name}, see {output}')
    if process.returncode:
        lines = [line for line in output.read_text(errors='replace').splitlines() if line.strip()]
        raise RunError(lines[-1] if lines else f'exit status {process.returncode}')
    return usage.ru_utime + usage.ru_stime


def end(number: int, *_: Any) -> None:
    """Stop what is at work, and this process: left alone, a run would go on writing beside the one that replaces it."""
    for process in tuple(RUNNING):  # which other threads may change
        process.send_signal(number)
    os._exit(128 + number)


def revision() -> str:
    """The revision of the checkout, with a mark where files differ from it; 'unknown' without git."""
    command = ['git', 'describe', '--always', '--dirty', '--abbrev=12', '--exclude=*']
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return 'unknown'
    return done.stdout.strip() or 'unknown'


def run_all(args: argparse.Namespace, work: Callable[..., dict] = run) -> bool:
    """Do the runs that are missing, several at a time, and write each down as it ends; one sweep at a time in a folder.

    Gives whether none was left out because it was interrupted, or another process was at work in its folder.

    Raises:
        FolderInUseError: Another sweep runs in the folder.
        ValueError: The folder holds runs of another kind, or two runs would be the same.
    """
    from mmadvmoe.runtime.files import FolderLock

    lock = FolderLock(args.work_dir, 'Wait until that sweep ends, or choose another --work-dir.')
    lock.acquire()
    try:
        return _run_missing(args, work)
    finally:
        lock.release()


def _run_missing(args: argparse.Namespace, work: Callable[..., dict]) -> bool:
    from mmadvmoe.runtime.files import FolderInUseError

    results = args.work_dir / 'results.jsonl'
    records = read(results)
    if any(record['cfg_options'] != args.cfg_options for record in records):
        raise ValueError(f'{results} holds runs with other --cfg-options: choose another --work-dir')
    kept = {identity(record) for record in records if record['status'] == 'done' or not args.retry_failed}
    jobs = [
        (config, settings, seed)
        for seed in dict.fromkeys(args.seeds)
        for config in args.configs
        for settings in grid(args.set)
    ]
    if len({(split(config)[1], tuple(settings), seed) for config, settings, seed in jobs}) < len(jobs):
        raise ValueError('a config is named twice, or a setting: each run would be done twice in one folder')
    folders: dict[str, tuple] = {}
    for config, settings, _ in jobs:
        job = split(config)[1], tuple(settings)
        if folders.setdefault(folder_of(*job), job) != job:
            raise ValueError(
                f'{job} and {folders[folder_of(*job)]} would write into one folder: rename one, or sweep apart'
            )
    digests = {path: digest_of(path) for path in {split(config)[1] for config in args.configs}}
    for record in records:
        digest = digests.get(record['config'])  # None of a config that this call does not name
        if digest is not None and record.get('config_sha256', digest) != digest:
            raise ValueError(f'{results} holds runs of {record["config"]} as it was before: choose another --work-dir')
    missing = [job for job in jobs if (split(job[0])[1], tuple(job[1]), job[2]) not in kept]
    print(f'==> {len(missing)} runs to do, {len(kept)} are in {results}; what a run writes is beside it', flush=True)

    left_out = []

    def one(job: tuple) -> None:
        try:
            record = work(*job, args)
        except (FolderInUseError, Interrupted) as error:
            left_out.append(job)
            print(f'{job[0]}, seed {job[2]}: {error}', flush=True)
            return
        with LOCK, results.open('a', encoding='utf-8') as file:
            file.write(json.dumps(record) + '\n')
        print(f'{record["method"]}, seed {record["seed"]}: {brief(record)}', flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        # list() waits, and raises what a worker raised.
        list(pool.map(one, missing))
    if left_out:
        print(f'==> {len(left_out)} runs were left out: run this again', flush=True)
    return not left_out


def brief(record: Mapping) -> str:
    """One run in one line."""
    if record['status'] == 'failed':
        return record['error']
    accuracies = ((k.split('/')[0], v) for k, v in record['metrics'].items() if k.endswith('/accuracy/top1'))
    values = ', '.join(f'{name} {value:.1f}' for name, value in accuracies)
    since = ' since they were resumed' if record.get('resumed') or record.get('test_resumed') else ''
    return f'{values} ({record["train_seconds"]} s to train, {record["test_seconds"]} s to test{since})'


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, end)
    sys.exit(0 if run_all(parse_args()) else 1)
