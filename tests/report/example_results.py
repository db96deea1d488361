"""Folders of results as the tools write them, of a mixture and of a dense model, with numbers that are easy to tell."""

import hashlib
import json

import numpy as np
import torch

from mmadvmoe.evaluation import Examples
from mmadvmoe.evaluation.folder import OutcomeFolder
from mmadvmoe.report.results import SavedExamples, save_examples

CLASSES = [str(n) for n in range(10)]
THREAT = dict(norm='Linf', eps=0.2, alpha=0.05, steps=50)


def write_model(folder, name, routing='image', num_experts=2, routers=('router',), ra=30.0, parts=None):
    """Write all parts of a model, or those named."""
    writers = dict(evaluation=_evaluation, dissection=_dissection, soundness=_soundness, examples=_examples)
    if parts is not None and 'curve' in parts:
        writers['curve'] = _curve
    kind = dict(routing=routing, num_experts=num_experts, routers=list(routers))
    if routing is None:
        kind = dict(routing=None, num_experts=1, routers=[])
    cost = dict(
        params_total=618780, params_active=446556, params_router=272000, pathway_gflops=6.3e-4, router_gflops=2.6e-3
    )
    _write(
        folder / 'model.json',
        dict(
            name=name,
            config='configs/some.py',
            checkpoint='work_dirs/some/epoch_60.pth',
            checkpoint_sha256='0123456789abcdef' * 4,
            config_text="model = dict(type='RobustClassifier')  # " + 'a very long line ' * 20,
            work_dir='work_dirs/some',
            class_names=CLASSES,
            cost=cost,
            **kind,
        ),
    )
    for part in writers if parts is None else parts:
        writers[part](folder, kind, ra)
    _write(folder / 'training.json', training_scalars())


def training_scalars():
    """What a run in turns logs: 30 epochs of 19 iterations."""
    steps = [19 * epoch for epoch in range(1, 31)]
    lines = {
        'experts.lr': lambda x: 0.1 * (1 - x / 600),
        'router.lr': lambda x: 0.01 * (1 - x / 600),
        'experts/loss': lambda x: 2.3 - x / 600,
        'experts/loss_natural': lambda x: 2.2 - x / 600,
        'experts/loss_robust': lambda x: 0.1 + x / 6000,
        'router/loss': lambda x: 30 - x / 60,
        'router/loss_balance': lambda x: 20,
        'router/loss_route_robust': lambda x: 8 - x / 100,
        'router/share_clean_0': lambda x: 0.55,
        'router/share_clean_1': lambda x: 0.45,
        'router/share_adversarial_0': lambda x: 0.6,
        'router/share_adversarial_1': lambda x: 0.4,
        'router/entropy': lambda x: 0.3,
        'router/load_entropy': lambda x: 0.68,
        'router/max_logit': lambda x: 40,
        'router/route_changed': lambda x: 0.1,
    }
    scalars = {name: [(x, line(x)) for x in steps] for name, line in lines.items()}
    for name, value in (('clean/accuracy/top1', 90), ('pgd10/accuracy/top1', 50), ('worst/accuracy/top1', 30)):
        scalars[name] = [(x, value) for x in steps[4::5]]
    scalars['pgd10/route_changed'] = [(x, 0.3) for x in steps[4::5]]
    return scalars


def _evaluation(folder, kind, ra):
    metrics = {
        f'{name}/accuracy/top1': value
        for name, value in dict(
            clean=95.0, pgd50=ra + 10, routepgd50=ra + 1, autoattack=ra - 5, ra=ra, worst=ra - 5
        ).items()
    }
    if kind['routing']:
        metrics |= {f'clean/expert_share/{n}': 1 / kind['num_experts'] for n in range(kind['num_experts'])}
        metrics |= {'pgd50/route_changed': 0.25, 'routepgd50/route_changed': 0.5}
    kinds = dict(pgd50='PGD', routepgd50='RoutePGD', autoattack='AutoAttack')
    attacks = {name: dict(type=kind, eps=0.2) for name, kind in kinds.items()}
    run = dict(
        format=2,
        settings=dict(
            model=dict(type='RobustClassifier', num_classes=10, num_experts=kind['num_experts'], sha256='ff' * 32),
            data=dict(type='Digits', num_images=360),
            attacks=attacks,
            survivors_only=['autoattack'],
            worst_of=dict(ra=['pgd50', 'routepgd50']),
            chunk_size=360,
            seed=0,
        ),
        versions=dict(python='3.11', torch='2.14.1'),
        machine=dict(device='cpu', threads=1),
    )
    written = OutcomeFolder(folder / 'evaluation', list(attacks))
    written.prepare(run, overwrite=True)
    written.close()
    _write(folder / 'evaluation' / 'metrics.json', metrics)
    digest = hashlib.sha256((folder / 'evaluation' / 'metrics.json').read_bytes()).hexdigest()
    (folder / 'evaluation' / 'SHA256SUMS').write_text(f'{digest}  metrics.json\n')


def _head(name, kind):
    return dict(
        kind=name,
        format=1,
        config='configs/some.py',
        checkpoint='work_dirs/some/epoch_60.pth',
        num_images=360,
        seed=0,
        seconds=71.2,
        class_names=CLASSES,
        threat_model=THREAT,
        sa=95.0,
        **kind,
    )


def _dissection(folder, kind, ra):
    outcome = dict(
        ra=ra,
        route_changed=0.25,
        decisions_changed=0.25,
        table=dict(kept=dict(kept=96, flipped=170), changed=dict(kept=16, flipped=60)),
    )
    content = _head('dissection', kind) | dict(
        attacks=dict(end_to_end=outcome), failures=None, experts=[], best_expert=None, load={}
    )
    if kind['routing']:
        names = ('gate', 'route_pgd', 'end_to_end', 'router', 'experts', 'experts_free')
        experts = range(kind['num_experts'])
        random = np.random.RandomState(0)
        per_class = random.dirichlet([1] * len(experts), len(CLASSES)).tolist()
        per_layer = random.dirichlet([1] * len(experts), len(kind['routers'])).tolist()
        load = dict(per_class=[*per_class[:9], None], per_layer=per_layer)
        content |= dict(
            attacks={name: outcome for name in names},
            failures=dict(standing=112, experts=170, router=60),
            experts=[dict(expert=n, sa=91.0, ra=12.0) for n in experts],
            best_expert=dict(sa=96.0, ra=35.0),
            flips_by_margin=[
                dict(margin_from=0.0, margin_mean=0.25, margin_to=0.5, decisions=180, changed=0.5),
                dict(margin_from=0.5, margin_mean=1.75, margin_to=3.0, decisions=180, changed=0.125),
            ],
            routes_certified=0.61 if kind['routing'] == 'image' else None,
            load={name: load for name in ('clean', 'gate', 'end_to_end', 'router')},
        )
    _write(folder / 'dissection.json', content)


def _soundness(folder, kind, ra):
    checks = [
        dict(name='eps_zero', title='RA at eps 0 equals SA', status='PASS', message='95.0 and 95.0.', numbers={}),
        dict(
            name='routes',
            title='The route hides no gradient',
            status='WARN',
            message=f'PGD through the gate leaves {ra + 10}, the worst attack {ra}: do not report the former.',
            numbers={},
        ),
    ]
    curves = dict(
        eps=[dict(eps=eps, ra=value) for eps, value in ((0.0, 95.0), (0.1, 60.0), (0.2, ra), (0.5, 0.0))],
        steps=[
            dict(steps=steps, ra=ra + 20 / steps, gate=ra + 20 / steps + (5 if kind['routing'] else 0))
            for steps in (1, 2, 5, 10, 50)
        ],
        restarts=[dict(restarts=1, ra=ra)],
    )
    content = dict(passed=False, num_warnings=1, checks=checks, curves=curves, attacks=dict(gate=ra + 10, held=ra))
    _write(folder / 'soundness.json', _head('soundness', kind) | content)


def _curve(folder, kind, ra):
    points = [dict(eps=eps, ra=value, gate=value) for eps, value in ((0.0, 95.0), (0.2, ra), (1.0, 0.0))]
    content = dict(kind='curve', num_images=100, threat_model=THREAT, curves=dict(eps=points))
    _write(folder / 'curve.json', content)


def _examples(folder, kind, ra):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 3, 8, 8, generator=generator)
    adversarial = (images + 0.2 * torch.randn(images.shape, generator=generator).sign()).clamp(0, 1)
    label = torch.arange(6)
    after = torch.where(label < 3, label + 1, label)
    tokens = 17 if kind['routing'] == 'token' else 1
    decisions = len(kind['routers']) * tokens
    route = torch.randint(kind['num_experts'], (2, 6, decisions), generator=generator)
    patches = [[], []]
    if kind['routing'] == 'token':
        patches = [list(view.view(6, -1, tokens).permute(1, 0, 2).numpy()) for view in route]
    save_examples(
        folder / 'examples.npz',
        SavedExamples(Examples(images, adversarial, label, label, after, *route), 'routepgd50', *map(tuple, patches)),
    )


def _write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
