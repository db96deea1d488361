"""Whether a robust accuracy can be believed: attacks of all kinds, held against each other.

Reads threat model and images from the config's test_cfg and test_dataloader, prints PASS or WARN for each check with
the numbers that speak against the model, and writes all of them to one JSON file. docs/dissection.md says what the
checks mean.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
import time
from dataclasses import asdict

from mmadvmoe.apis import load_robust_model
from mmadvmoe.attacks import Victim
from mmadvmoe.diagnosis.dissection_tables import threat_text
from mmadvmoe.diagnosis.soundness import curves, measure, ra_of_each
from mmadvmoe.diagnosis.soundness_checks import WARN, make_checks
from mmadvmoe.diagnosis.subject import load_subject, parse_arguments, write_json
from mmadvmoe.runtime.launch import check_checkpoint, load_config


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--surrogate',
        nargs=2,
        metavar=('CONFIG', 'CHECKPOINT'),
        help='model to transfer adversarial images from [a small network trained on the answers of the model]',
    )
    parser.add_argument('--queries', type=int, default=1000, help='queries of Square for each image [%(default)s]')
    parser.add_argument('--strict', action='store_true', help='exit with status 1 when there is a warning')
    args = parse_arguments(parser, num_images=200)
    if args.queries < 1:
        parser.error(f'--queries {args.queries} must be at least 1')
    return args


def main() -> None:
    args = parse_args()
    started = time.monotonic()
    surrogate = None
    if args.surrogate is not None:
        check_checkpoint(args.surrogate[1], '--surrogate')
        surrogate = Victim(load_robust_model(load_config(args.surrogate[0]), args.surrogate[1], args.device))
    subject = load_subject(args, 'soundness')
    measured = measure(subject.victim, subject.data, subject.threat, surrogate, args.queries)
    checks = make_checks(measured)
    warnings = [check for check in checks if check.status == WARN]
    print(f'\n{args.config}: {threat_text(subject.header)}\nSA {measured.sa:.1f} %')
    for check in checks:
        print(f'\n{check.status}  {check.title}')
        print(textwrap.fill(check.message, 110, initial_indent=6 * ' ', subsequent_indent=6 * ' '))
    print(f'\n{len(warnings)} warnings' + (': ' + ', '.join(check.name for check in warnings) if warnings else ''))
    if args.out is not None:
        report = dict(
            subject.header,
            seconds=round(time.monotonic() - started, 1),
            sa=measured.sa,
            passed=not warnings,
            num_warnings=len(warnings),
            checks=[asdict(check) for check in checks],
            curves=curves(measured),
            attacks=ra_of_each(measured),
        )
        write_json(args.out, report)
        print(f'all numbers: {args.out}')
    if warnings and args.strict:
        sys.exit(1)


if __name__ == '__main__':
    main()
