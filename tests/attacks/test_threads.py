"""Threads that share one model get what a single thread gets, and leave its flags as they were."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from small_mixtures import UNIT
from torch import nn

from mmadvmoe.apis import inference
from mmadvmoe.attacks import NormalizedClassifier, Pathway, Rescaled, build_attack


def flags(model):
    return [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]


def jobs(model, images, routed):
    """Calls of each kind, every one a function without arguments that always gives the same."""
    with torch.no_grad():
        labels = model(images).argmax(1)

    def plain(part):
        with torch.no_grad():
            return model(part)

    def gradient(part):
        points = part.clone().requires_grad_()
        return torch.autograd.grad(model(points).sum(), points)[0]

    def attacked(part, target, **cfg):
        return build_attack(dict(cfg, eps=0.1), model)(part, target, seed=0)

    shared = build_attack(dict(type='PGD', eps=0.1, steps=2), model)
    made = []
    for i in range(0, len(images), 5):
        part, target = images[i : i + 5], labels[i : i + 5]
        made += [
            lambda part=part: plain(part),
            lambda part=part: gradient(part),
            lambda part=part: inference(model, part)[0],
            lambda part=part, target=target: attacked(part, target, type='PGD', steps=2),
            lambda part=part, target=target: attacked(part, target, type='Square', n_queries=3),
            lambda part=part, target=target, i=i: shared(part, target, seed=i),
        ]
        if not routed:
            continue

        def forced(part=part, i=i):
            with torch.no_grad():
                return model.forward_routed(part, torch.full((len(part),), i % 2))[0]

        made += [
            forced,
            lambda part=part: inference(model, part)[1].float(),
            lambda part=part, target=target: attacked(part, target, type='BIM', steps=2, route='held'),
            lambda part=part, target=target: attacked(part, target, type='RoutePGD', steps=2),
            lambda part=part, i=i: Rescaled(Pathway(model, i % 2), 2.0)(part).detach(),
        ]
    return made


@pytest.mark.parametrize(('kind', 'calls'), [('dense', 200), ('image', 400), ('layer', 100)])
def test_four_threads_get_what_one_gets(make_tiny, make_moe, kind, calls):
    classifier = make_tiny()[0].classifier if kind == 'dense' else make_moe(kind, data_preprocessor=UNIT)
    model = NormalizedClassifier(classifier.eval())
    # A mixture of flags that must come back.
    model.classifier.head.requires_grad_(False)
    images = torch.rand(20, 3, 8, 8)
    made = jobs(model, images, routed=kind != 'dense')
    expected = [job() for job in made]
    before = flags(model)
    order = torch.randperm(calls, generator=torch.Generator().manual_seed(0)).remainder(len(made)).tolist()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: made[n](), order))
    for n, result in zip(order, found, strict=True):
        torch.testing.assert_close(result, expected[n], rtol=1e-4, atol=1e-5, msg=lambda text, n=n: f'job {n}: {text}')
    assert flags(model) == before


def test_the_last_one_out_restores_the_flags():
    model = NormalizedClassifier(nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.Dropout())).train()
    before = flags(model)
    inside, leave = threading.Barrier(5), [threading.Event() for _ in range(4)]

    def hold(event):
        with model.frozen():
            inside.wait()
            event.wait()

    threads = [threading.Thread(target=hold, args=(event,)) for event in leave]
    for thread in threads:
        thread.start()
    inside.wait()
    for thread, event in zip(threads, leave):
        assert flags(model) == ([False] * 5, [False] * 2)
        event.set()
        thread.join()
    assert flags(model) == before


def test_what_one_thread_holds_does_not_decide_what_another_is_refused(make_tiny):
    victim, images, _ = make_tiny()
    with victim.frozen(), ThreadPoolExecutor(1) as pool:
        assert victim(images * 255).isfinite().all()
        with pytest.raises(ValueError, match=r'must be in \[0, 1\]'):
            pool.submit(victim, images * 255).result()
