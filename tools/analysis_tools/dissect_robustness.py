"""Why a model fails under attack: attack all of it, its routers alone, its experts alone, and each expert by itself.

Reads threat model and images from the config's test_cfg and test_dataloader, prints tables, and writes all numbers to
one JSON file. docs/dissection.md says what they mean.
"""

from __future__ import annotations

import argparse
import time

from mmadvmoe.diagnosis.dissection import dissect, summarize
from mmadvmoe.diagnosis.dissection_tables import dissection_tables
from mmadvmoe.diagnosis.subject import load_subject, parse_arguments, write_json


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    return parse_arguments(parser, num_images=1000)


def main() -> None:
    args = parse_args()
    started = time.monotonic()
    subject = load_subject(args, 'dissection')
    found = summarize(dissect(subject.victim, subject.data, subject.threat))
    report = dict(subject.header, seconds=round(time.monotonic() - started, 1), **found)
    print(dissection_tables(report))
    if args.out is not None:
        write_json(args.out, report)
        print(f'\nall numbers: {args.out}')


if __name__ == '__main__':
    main()
