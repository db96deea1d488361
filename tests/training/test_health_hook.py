import math

import pytest
import torch
from mmengine.hooks import Hook
from mmpretrain.registry import HOOKS, MODELS
from tiny_runs import build_runner, group_cfg, model_cfg, run_cfg, turns_cfg

from mmadvmoe.models import NonFiniteError, RobustClassifier, RoutingRecord
from mmadvmoe.moe import Routing
from mmadvmoe.training.health_hook import RouterHealthHook, _Tally

# Of one batch of four images, per router: clean and adversarial logits of two experts.
CLEAN = [[[0.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 3.0]], [[0.0, 1.0]] * 4]
ADVERSARIAL = [[[0.0, 5.0], [2.0, 0.0], [1.0, 0.0], [0.0, 3.0]], [[0.0, 1.0]] * 4]


@MODELS.register_module()
class ScriptedRoutes(RobustClassifier):
    """Reports given routes instead of those it took."""

    routers, with_clean, adversarial = 1, True, ADVERSARIAL

    def loss(self, *args, **kwargs):
        losses = super().loss(*args, **kwargs)
        clean, adversarial = (
            tuple(Routing.decide(torch.tensor(logits), gate=None) for logits in side)
            for side in (CLEAN[: self.routers], self.adversarial[: self.routers])
        )
        self.routing_records = {kwargs.get('turn'): RoutingRecord(clean if self.with_clean else (), adversarial)}
        return losses


def train(tmp_path, hook=None, before=None, **kwargs):
    hooks = [dict(type='RouterHealthHook', **(hook or {})), *kwargs.pop('hooks', ())]
    runner = build_runner(run_cfg(tmp_path, hooks=hooks, **kwargs))
    if before:
        before(runner.model)
    runner.train()
    return runner


def reported(runner):
    return {
        key.removeprefix('router/'): buffer.data[0].tolist()
        for key, buffer in runner.message_hub.log_scalars.items()
        if key.startswith('router/')
    }


def log_of(tmp_path):
    (log,) = tmp_path.glob('*/*.log')
    return log.read_text()


def entropy(*probabilities):
    return -sum(p * math.log(p) for p in probabilities if p)


def test_reports_each_epoch_what_the_router_did(tmp_path):
    runner = train(tmp_path, model=model_cfg(type='ScriptedRoutes'), log_level='INFO')
    odds = [math.exp(gap) / (1 + math.exp(gap)) for gap in (0, 2, 1, 3)]
    expected = dict(
        share_clean_0=0.75,
        share_clean_1=0.25,
        share_adversarial_0=0.5,
        share_adversarial_1=0.5,
        entropy=sum(entropy(p, 1 - p) for p in odds) / 4,
        load_entropy=entropy(0.75, 0.25),
        max_logit=5.0,
        route_changed=0.25,
    )
    scalars = reported(runner)
    assert set(scalars) == set(expected)
    for key, value in expected.items():
        assert scalars[key] == pytest.approx([value, value])  # two epochs
    log = log_of(tmp_path)
    assert log.count('share clean: 0.750/0.250  share adversarial: 0.500/0.500') == 2
    assert 'route changed: 25.00%' in log and 'max |logit|: 5' in log
    assert 'Starving' not in log


def test_several_routers_are_reported_one_by_one_and_as_a_mean(tmp_path):
    model = model_cfg(type='ScriptedRoutes')
    runner = train(tmp_path, epochs=1, model=model, before=lambda m: setattr(m, 'routers', 2))
    scalars = reported(runner)
    assert scalars['0/share_clean_0'] == [0.75] and scalars['1/share_clean_0'] == [0.0]
    assert scalars['share_clean_0'] == [0.375]
    assert scalars['0/max_logit'] == scalars['max_logit'] == [5.0]
    assert scalars['1/max_logit'] == [1.0]
    assert scalars['route_changed'] == [0.125]


def test_training_on_adversarial_images_alone_is_reported(tmp_path):
    model = model_cfg(type='ScriptedRoutes')
    before = lambda m: setattr(m, 'with_clean', False)  # noqa: E731
    scalars = reported(train(tmp_path, epochs=1, model=model, before=before))
    assert scalars['share_adversarial_0'] == [0.5]
    assert scalars['load_entropy'] == [pytest.approx(math.log(2))]
    assert 'route_changed' not in scalars and 'share_clean_0' not in scalars


def test_real_routes_are_counted_once_per_image(tmp_path):
    scalars = reported(train(tmp_path, hook=dict(interval=2), model=model_cfg(routing='layer')))
    assert len(scalars['share_clean_0']) == 4  # eight iterations
    for first, second in zip(scalars['7/share_clean_0'], scalars['7/share_clean_1']):
        assert first + second == 1 and (first * 8).is_integer()


def test_routes_that_are_held_show_what_the_router_would_have_done():
    clean = Routing.decide(torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.0, 0.0]]))
    held = Routing.fixed(clean.expert, 2, torch.tensor([[0.0, 1.0], [0.0, 2.0], [1.0, 0.0]]))
    tally = _Tally((clean,))
    tally.add((clean,), (held,))
    tally.reduce()
    assert tally.measure()[0]['route_changed'] == pytest.approx(1 / 3)


def test_training_by_iterations_is_reported_as_often_as_it_validates(tmp_path):
    cfg = run_cfg(tmp_path, hooks=[dict(type='RouterHealthHook')])
    cfg.train_cfg = dict(by_epoch=False, max_iters=6, val_interval=2)
    runner = build_runner(cfg)
    runner.train()
    assert len(reported(runner)['max_logit']) == 3
    (hook,) = (hook for hook in runner.hooks if isinstance(hook, RouterHealthHook))
    assert hook.interval is None  # a training by epochs that it watches next is reported by epochs


def test_the_routes_of_both_turns_count_where_they_share_a_batch(tmp_path):
    class Counter(Hook):
        priority = 'NORMAL'  # before the health hook takes them

        def __init__(self):
            self.seen = []

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            self.seen.append(sorted(runner.model.routing_records))

    counter = Counter()
    health = dict(type='RouterHealthHook', priority='LOW')
    runner = build_runner(run_cfg(tmp_path, hooks=[health], epochs=1, schedule=dict(reuse_batch=True)))
    runner.register_hook(counter)
    runner.train()
    assert counter.seen == [['experts', 'router']] * 4
    # Sixteen images, each routed in both turns.
    assert (reported(runner)['share_clean_0'][0] * 32).is_integer() and runner.model.routing_records == {}


@pytest.mark.parametrize('starve_below, starves', [(0.1, False), (0.8, True)])
def test_warns_once_an_epoch_of_an_expert_that_starves(tmp_path, starve_below, starves):
    model, hook = model_cfg(type='ScriptedRoutes'), dict(starve_below=starve_below)
    train(tmp_path, hook=hook, model=model)
    log = log_of(tmp_path)
    for step in (4, 8):  # expert 1 gets 3 of 8 images, clean and adversarial ones together
        warning = f'iteration {step}: expert 1 of router 0 (37.50%) got less than 40.00%'
        assert log.count(warning) == starves


@HOOKS.register_module()
class PoisonHook(Hook):
    """Makes a value NaN in the third iteration, and keeps the weights as they were then."""

    priority = 'VERY_LOW'

    def __init__(self, what, name):
        self.what, self.name = what, name

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 2:
            parameter = runner.model.get_parameter(self.name)
            if self.what == 'weight':
                parameter.data[0] = float('nan')
            else:
                parameter.register_hook(lambda grad: grad * float('nan'))
            runner.model.kept = {n: p.detach().clone() for n, p in runner.model.named_parameters()}


@pytest.mark.parametrize(
    'what, name, message, optim_wrapper',
    [
        ('weight', 'head.fc.bias', 'class logits in a turn of the experts', turns_cfg()),
        ('weight', 'backbone.router.fc.bias', 'router logits', turns_cfg()),
        ('grad', 'head.fc.bias', r'gradient of head\.fc\.bias', turns_cfg()),
        ('grad', 'head.fc.bias', 'gradient of', turns_cfg(clip_grad=dict(max_norm=1.0))),
        ('grad', 'head.fc.bias', r'gradient of head\.fc\.bias', group_cfg()),
    ],
)
def test_stops_before_a_number_that_is_not_finite_reaches_the_weights(tmp_path, what, name, message, optim_wrapper):
    kwargs = dict(optim_wrapper=optim_wrapper)
    hooks = [dict(type='RouterHealthHook'), dict(type='PoisonHook', what=what, name=name)]
    if 'constructor' in optim_wrapper:
        kwargs['hooks'] = hooks
    else:
        kwargs['custom_hooks'] = hooks
    runner = build_runner(run_cfg(tmp_path, **kwargs))
    with pytest.raises(NonFiniteError, match=f'at iteration 3: .*{message}'):
        runner.train()
    for parameter_name, parameter in runner.model.named_parameters():
        kept = runner.model.kept[parameter_name]
        assert torch.equal(parameter.nan_to_num(7), kept.nan_to_num(7)), parameter_name


def test_gradients_are_no_longer_watched_after_training(tmp_path):
    runner = train(tmp_path, epochs=1)
    for member in runner.optim_wrapper.values():
        assert not member.optimizer._optimizer_step_pre_hooks


def test_a_training_after_one_that_failed_is_watched_once(tmp_path):
    runner = build_runner(run_cfg(tmp_path, hooks=[dict(type='RouterHealthHook')]))
    (hook,) = (hook for hook in runner.hooks if isinstance(hook, RouterHealthHook))
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    for _ in range(2):  # without `after_train`
        hook.before_train(runner)
    assert all(len(member.optimizer._optimizer_step_pre_hooks) == 1 for member in runner.optim_wrapper.values())


def test_a_dense_network_is_left_alone(tmp_path):
    hooks = [dict(type='RouterHealthHook')]
    cfg = run_cfg(
        tmp_path,
        epochs=1,
        model=model_cfg(num_experts=1),
        optim_wrapper=group_cfg(),
        custom_hooks=hooks,
    )
    runner = build_runner(cfg)
    runner.train()
    assert not reported(runner)


def test_routers_that_nobody_can_watch_are_refused(tmp_path):
    model = model_cfg(type='ImageClassifier', data_preprocessor=dict(type='ClsDataPreprocessor'))
    del model['robust_loss']
    with pytest.raises(TypeError, match="model.type='RobustClassifier'"):
        train(tmp_path, model=model)


@pytest.mark.parametrize('wrong', [dict(interval=0), dict(starve_below=-0.1), dict(starve_below=2)])
def test_wrong_values_are_named(wrong):
    ((key, value),) = wrong.items()
    with pytest.raises(ValueError, match=f'{key}={value}'):
        RouterHealthHook(**wrong)
