"""The checkpoints that a run has in its own folder, and the pointer to the last one."""

from __future__ import annotations

import os
import os.path as osp
import re
from collections.abc import Callable, Sequence
from itertools import count

from mmadvmoe.utils import some

from .files import AtomicLocalBackend, is_sealed
from .safe_load import CheckpointError, load_from_local

POINTER = 'last_checkpoint'


class CheckpointFolder:
    """A folder with the checkpoints of one run.

    Everything in it goes by the names of files: a path that a checkpoint or the pointer holds, as MMEngine writes them,
    may lead into the folder of another run.

    Args:
        path: The folder.
        template: Name of a checkpoint, with ``{}`` for its epoch or iteration.
    """

    def __init__(self, path: str, template: str) -> None:
        self.path = path
        step = re.escape(template).replace(r'\{\}', r'(\d+)')
        self._pattern = re.compile(rf'(best_.+_)?{step}')

    def holds(self, checkpoint: str | None) -> bool:
        """Whether a path is that of a file right in the folder."""
        return checkpoint is not None and osp.realpath(osp.dirname(checkpoint) or '.') == osp.realpath(self.path)

    def find(self, checkpoint: str | None) -> str | None:
        """The file of this folder with the name of ``checkpoint``, wherever that lies; None if there is none."""
        own = osp.join(self.path, osp.basename(checkpoint or ''))
        return own if checkpoint and osp.exists(own) else None

    def choose(self, work_dir: str, warn: Callable[[str], None]) -> str | None:
        """Choose the checkpoint to go on from: the newest one that loads.

        That is the one that the pointer in ``work_dir`` names, or one that was saved after it by a run that was killed
        before it wrote the pointer; ``warn`` is told of that. Later checkpoints without a seal are older than this
        rule, and may be of another training.

        Returns:
            str: Its path; None where there is neither pointer nor checkpoint, and so nothing to go on from.

        Raises:
            CheckpointError: There is a pointer or a checkpoint, and no checkpoint that loads.
        """
        named, problem = self._read_pointer(work_dir)
        problems = [] if problem is None else [problem]
        saved = [osp.join(self.path, name) for _, name in self._saved() if not name.startswith('best_')]
        if not problems and named is None and not saved:
            return None
        later = saved[: saved.index(named)] if named in saved else []
        later = [path for path in later if osp.isfile(path) and is_sealed(path)]
        for candidate in dict.fromkeys([*later, *filter(None, [named]), *saved]):
            try:
                load_from_local(candidate, map_location='cpu')
            except (CheckpointError, OSError) as error:
                problems.append(str(error))
                continue
            if candidate in later:
                problems.append(f'{osp.join(work_dir, POINTER)!r} names {named!r}, which is not the newest one.')
            if problems:
                warn(f'{problems[0]} Resuming from {candidate!r} instead.')
            return candidate
        raise CheckpointError(
            f'Nothing to resume from in {work_dir!r}. {" ".join(problems[:2])} No other checkpoint there loads either. '
            'Name one with `load_from` (--resume FILE), or start anew in another `work_dir`.'
        )

    def point_to(self, checkpoint: str, work_dir: str) -> None:
        """Write the pointer."""
        AtomicLocalBackend().put_text(osp.basename(checkpoint), osp.join(work_dir, POINTER))

    def set_aside(self, step: int, work_dir: str, warn: Callable[[str], None]) -> None:
        """Move the checkpoints of later steps, which another training has left here, into a folder below this one.

        ``step`` is the epoch or iteration from which training goes on here, 0 for a new one. ``work_dir`` has the
        pointer; ``warn`` is told before anything is moved.
        """
        names = [name for number, name in self._saved() if number > step]
        if not names:
            return
        asides = (osp.join(self.path, f'earlier_{number}') for number in count(1))
        aside = next(path for path in asides if not osp.exists(path))
        begins = f'This training goes on after step {step}' if step else 'A new training begins'
        warn(
            f'{begins} in {self.path!r}, which holds checkpoints of another: {some(names, 6)}. They are '
            f'moved to {aside!r}, which you may delete. To go on with one of them, start with --resume FILE, the '
            'one there.'
        )
        pointer = osp.join(work_dir, POINTER)
        if step == 0 and osp.exists(pointer):
            os.remove(pointer)
        os.mkdir(aside)
        for name in names:
            os.rename(osp.join(self.path, name), osp.join(aside, name))

    def _read_pointer(self, work_dir: str) -> tuple[str | None, str | None]:
        """The file that the pointer names, and what is wrong with it; both None where there is none."""
        path = osp.join(work_dir, POINTER)
        if not osp.exists(path):
            problem = f'{path!r} is missing, which names the last checkpoint.' if self._saved() else None
            return None, problem
        try:
            with open(path, encoding='utf-8') as file:
                name = file.read().strip()
        except UnicodeDecodeError:
            return None, f'{path!r} is damaged: it is not text.'
        own = self.find(name) if '\0' not in name else None
        return own, None if own else f'{path!r} names {name!r}, which is not in {self.path!r}.'

    def _saved(self) -> Sequence[tuple[int, str]]:
        """Step and name of each checkpoint, the newest first."""
        names = os.listdir(self.path) if osp.isdir(self.path) else []
        found = [(int(match[2]), match[0]) for match in map(self._pattern.fullmatch, names) if match]
        return sorted(found, reverse=True)
