"""A dissection as tables of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

#: The attacks in words.
ATTACKS = dict(
    end_to_end='whole model, worst case',
    gate='whole model, through the gate (PGD)',
    route_pgd='whole model, each route forced (RoutePGD)',
    router='router alone, to change routes',
    experts='experts alone, route held',
    experts_free='the same images, routers free',
)
#: What becomes of an image that is right without an attack; see :func:`~mmadvmoe.diagnosis.dissection.failures`.
FAILURES = dict(
    standing='robust',
    experts='flipped though the route is held (experts)',
    router='flipped only when the route is free (router)',
)
#: The loads that tables show; the others are in the file.
_LOADS = dict(clean='clean', end_to_end='attacked', router='router attacked')
#: Of more experts than this, tables show the busiest one.
_MOST_EXPERTS = 4


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be; the first one flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    text = []
    for first, *others in (header, *rows):
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        text.append('  '.join([first.ljust(widths[0]), *cells]).rstrip())
    return '\n'.join([text[0], '-' * max(map(len, text)), *text[1:]])


def threat_text(report: Mapping, images: str = 'test images') -> str:
    """The threat model, and on how many of which ``images``, in one line."""
    threat = report['threat_model']
    return (
        f'{threat["norm"]} ball of eps {threat["eps"]:.4g}, {threat["steps"]} steps of {threat["alpha"]:.4g}, '
        f'{report["num_images"]:,} {images}'
    )


def dissection_tables(report: Mapping) -> str:
    """All tables of a dissection: of :func:`~mmadvmoe.diagnosis.dissection.summarize`, and the header of its file."""
    parts = [f'{report["config"]}: {threat_text(report)}\nSA {report["sa"]:.1f} %', _attacks(report)]
    if report['routing'] is None:
        parts.append('This model is dense: it has no routers and experts to attack apart, so this is all there is.')
        return '\n\n'.join(parts)
    if report['flips_by_margin']:
        parts.append(_flips(report))
    parts += [_failures(report), _experts(report), _loads(report, 'class', 'per_class', report['class_names'])]
    return '\n\n'.join([*parts, _loads(report, 'router', 'per_layer', report['routers'])])


def _attacks(report: Mapping) -> str:
    is_moe = report['routing'] is not None
    header = ['attack on', 'RA %', 'kept/kept', 'kept/flipped', 'changed/kept', 'changed/flipped', 'routes changed %']
    rows = []
    for name, found in report['attacks'].items():
        words = ATTACKS[name] if is_moe else 'whole model, PGD'
        rows.append([words, f'{found["ra"]:.1f}', *counts_of(found), f'{100 * found["route_changed"]:.1f}'])
        if len(report['routers']) > 1:
            rows[-1].append(f'{100 * found["decisions_changed"]:.1f}')
    if len(report['routers']) > 1:
        header.append('decisions changed %')
    if not is_moe:
        return text_table([*header[:2], 'kept', 'flipped'], [row[:4] for row in rows])
    counted = 'Attacks. Counts: route/prediction, of the images that are right without an attack'
    return '\n'.join(filter(None, [counted, text_table(header, rows), routes_text(report)]))


def counts_of(found: Mapping) -> list[str]:
    """What an attack did to images that are right without it: with the route kept, still right and flipped; changed."""
    return [str(found['table'][route][after]) for route in ('kept', 'changed') for after in ('kept', 'flipped')]


def routes_text(report: Mapping) -> str:
    """Shares of images whose route provably cannot change and whose route an attack changed, and what lies between.

    Empty where there are no bounds, or where the file of an older version does not tell them.
    """
    certified = report.get('routes_certified')
    if certified is None:
        return ''
    changed = report['attacks']['router']['route_changed']
    return (
        f'Routes: {certified:.1%} of the images provably keep theirs whatever the perturbation, {changed:.1%} lose it '
        f'to the attack on the router, {max(1 - certified - changed, 0):.1%} are open.'
    )


def _flips(report: Mapping) -> str:
    rows = [
        [f'{one["margin_from"]:.2f} to {one["margin_to"]:.2f}', str(one['decisions']), f'{100 * one["changed"]:.1f}']
        for one in report['flips_by_margin']
    ]
    title = 'Decisions that the attack on the router changed, by their margin without it (1: the mean of a router)'
    return f'{title}\n{text_table(["margin", "decisions", "changed %"], rows)}'


def _failures(report: Mapping) -> str:
    failures = report['failures']
    total = max(sum(failures.values()), 1)
    rows = [[FAILURES[key], str(count), f'{100 * count / total:.1f}'] for key, count in failures.items()]
    return f'Who fails, of the images that are right without an attack\n{text_table(["images", "count", "%"], rows)}'


def expert_rows(report: Mapping) -> list[tuple[str, float, float]]:
    """Name, SA and RA, in percent, of each expert on all images, and of the best one for each image."""
    named = {f'expert {each["expert"]}': each for each in report['experts']}
    named['best expert of each image'] = report['best_expert']
    return [(name, found['sa'], found['ra']) for name, found in named.items()]


def _experts(report: Mapping) -> str:
    rows = [[name, f'{sa:.1f}', f'{ra:.1f}'] for name, sa, ra in expert_rows(report)]
    return f'Each expert on all images, attacked as a network of its own\n{text_table(["", "SA %", "RA %"], rows)}'


def _loads(report: Mapping, of: str, key: str, names: Sequence[str]) -> str:
    """Share of each expert per class or router, without an attack and under two."""
    experts = range(report['num_experts'])
    if len(experts) > _MOST_EXPERTS:
        columns = [f'{words}: busiest' for words in _LOADS.values()]
    else:
        columns = [f'{words}: {n}' if n == 0 else str(n) for words in _LOADS.values() for n in experts]
    loads = zip(names, *(report['load'][attack][key] for attack in _LOADS))
    rows = [[name, *_cells(shares)] for name, *shares in loads if None not in shares]
    return f'Load of the experts per {of}, in % of the decisions\n{text_table([of, *columns], rows)}'


def _cells(loads: Sequence[Sequence[float]]) -> list[str]:
    """The share of each expert; or, of many experts, the busiest one and its share."""
    if len(loads[0]) <= _MOST_EXPERTS:
        return [f'{100 * share:.0f}' for shares in loads for share in shares]
    return [f'{shares.index(max(shares))} ({100 * max(shares):.0f})' for shares in loads]
