"""Try some thousand faults on small runs, from flipped bytes to killed launchers, and print what became of each kind.

Takes about half an hour on one core. Started again, it goes on where it stopped; cases that failed are tried again.
"""

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--work-dir', type=Path, default=Path('work_dirs/faults'), help='where results go [%(default)s]'
    )
    parser.add_argument(
        '--only', nargs='+', metavar='WORD', help='only kinds of faults with one of these words in them'
    )
    parser.add_argument('--cases', type=int, help='at most so many cases of each kind')
    return parser.parse_args()


def read(path: Path) -> dict[tuple[str, int], dict]:
    """The cases tried so far; of one that was tried again, the last line counts, and one cut off by a kill does not."""
    found = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        found[record['fault'], record['number']] = record
    return found


def try_case(name: str, number: int, log: Path) -> dict:
    """Run one case in a folder of its own; what it prints goes into ``log``."""
    from fault_cases import FAULTS

    started = time.perf_counter()
    record = dict(fault=name, number=number)
    with tempfile.TemporaryDirectory() as folder, log.open('a') as file, redirect_stdout(file), redirect_stderr(file):
        try:
            record['result'] = FAULTS[name].run(Path(folder), number)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # what pytest raises is no Exception
            record.update(result='FAILED', error=f'{type(error).__name__}: {error}')
    return dict(record, seconds=round(time.perf_counter() - started, 3))


def table(records: Sequence[Mapping], total: Mapping[str, int]) -> str:
    """What became of each kind of fault, in Markdown."""
    lines = ['| fault | cases | what became of them | failed | seconds |', '| --- | ---: | --- | ---: | ---: |']
    for name, cases in total.items():
        own = [record for record in records if record['fault'] == name]
        results = Counter(record['result'] for record in own)
        failed = results.pop('FAILED', 0)
        words = ', '.join(f'{count} {word}' for word, count in results.most_common())
        seconds = sum(record['seconds'] for record in own)
        lines.append(f'| {name} | {len(own)} of {cases} | {words} | {failed} | {seconds:.0f} |')
    failed = sum(record['result'] == 'FAILED' for record in records)
    seconds = sum(record['seconds'] for record in records)
    return '\n'.join([*lines, f'| all | {len(records)} of {sum(total.values())} | | {failed} | {seconds:.0f} |'])


def main() -> None:
    args = parse_args()
    if not (ROOT / 'tests').is_dir():
        sys.exit('the fault suite is part of the tests: run it in a checkout')
    sys.path[:0] = [str(ROOT), str(ROOT / 'tests/helpers'), str(ROOT / 'tests/faults')]
    warnings.simplefilter('ignore')
    import torch
    from fault_cases import FAULTS

    torch.set_num_threads(1)
    total = {
        name: min(fault.cases, args.cases or fault.cases)
        for name, fault in FAULTS.items()
        if args.only is None or any(word in name for word in args.only)
    }
    args.work_dir.mkdir(parents=True, exist_ok=True)
    results = args.work_dir / 'results.jsonl'
    done = read(results)
    with results.open('a') as file:
        file.write('\n')  # the last line may be cut off
        for name, cases in total.items():
            for number in range(cases):
                if done.get((name, number), dict(result='FAILED'))['result'] == 'FAILED':
                    done[name, number] = try_case(name, number, args.work_dir / 'log.txt')
                    file.write(json.dumps(done[name, number]) + '\n')
                    file.flush()
            print(table([done[name, number] for number in range(cases)], {name: cases}).splitlines()[2], flush=True)
    records = [record for record in done.values() if record['fault'] in total]
    text = table(records, total)
    (args.work_dir / 'table.md').write_text(text + '\n')
    print(text)
    for record in records:
        if record['result'] == 'FAILED':
            print(f'FAILED {record["fault"]}, case {record["number"]}: {record["error"]}', file=sys.stderr)
    sys.exit(any(record['result'] == 'FAILED' for record in records))


if __name__ == '__main__':
    main()
