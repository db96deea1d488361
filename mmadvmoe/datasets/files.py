"""What is there of a data set on disk."""

from __future__ import annotations

import os
import os.path as osp
from collections import defaultdict
from collections.abc import Iterable

_SHOWN = 3


def files_in(folder: str) -> set[str]:
    """Names of the files in a folder; none if there is no such folder."""
    if not osp.isdir(folder):
        return set()
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if not entry.is_dir()}


def folders_in(folder: str) -> list[str]:
    """Names of the folders in a folder, sorted; none if there is no such folder."""
    if not osp.isdir(folder):
        return []
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir())


def missing_files(root: str, names: Iterable[str]) -> list[str]:
    """Say, folder by folder, which of the listed files are missing.

    Folders are listed once instead of asking for each of a million files.

    Args:
        root: What the names are relative to.
        names: Relative paths with ``/``.

    Returns:
        One sentence part per folder that lacks files, such as ``'train/n01440764: 12 of 1300 images missing'``.
    """
    by_folder: dict[str, list[str]] = defaultdict(list)
    for name in names:
        folder, _, file = name.rpartition('/')
        by_folder[folder].append(file)
    problems = []
    for folder, files in by_folder.items():
        missing = len(set(files) - files_in(osp.join(root, folder)))
        if missing:
            problems.append(f'{folder or "."}: {missing} of {len(files)} images missing')
    return problems


def summary(problems: list[str]) -> str:
    """Join sentence parts, the first few of them."""
    more = f'; and {len(problems) - _SHOWN} more' if len(problems) > _SHOWN else ''
    return '; '.join(problems[:_SHOWN]) + more
