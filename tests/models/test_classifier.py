import re

import pytest
import torch
from mmpretrain.models.heads import ConformerHead  # noqa: F401  (fills MMPretrain's registry)
from mmpretrain.registry import MODELS
from tiny_models import CLASSES, classifier_cfg, make_data, moe_backbone

from mmadvmoe.models import NonFiniteError, RoutingRecord, TRADESLoss
from mmadvmoe.moe import ExpertLayer, forward_routed, split_parameters

FGSM = dict(attack=dict(type='FGSM', eps=0.1))
LABEL = dict(type='RouterLabelLoss', alpha=1.0, beta=1.0)


def build(moe=False, **overrides):
    torch.manual_seed(0)
    return MODELS.build(classifier_cfg(moe=moe, **dict(data_preprocessor=FGSM) | overrides))


def losses_of(model, count=4, **turn):
    return model.loss(**model.data_preprocessor(dict(make_data(count), **turn), training=True))


def vit(**overrides):
    arch = dict(embed_dims=8, num_layers=2, num_heads=2, feedforward_channels=8)
    return dict(type='VisionTransformer', arch=arch, img_size=8, patch_size=4) | overrides


HEADS = {
    'linear': dict(),
    'stacked': dict(
        head=dict(
            type='StackedLinearClsHead',
            num_classes=CLASSES,
            in_channels=4,
            mid_channels=[5],
            norm_cfg=dict(type='BN1d'),
        )
    ),
    'vit': dict(
        backbone=vit(), neck=None, head=dict(type='VisionTransformerClsHead', num_classes=CLASSES, in_channels=8)
    ),
    'vit-moe': dict(
        backbone=dict(type='MoEBackbone', num_experts=2, include=[r'ffn.*layers\.1'], routing='layer', backbone=vit()),
        neck=None,
        head=dict(type='VisionTransformerClsHead', num_classes=CLASSES, in_channels=8, hidden_dim=6),
    ),
    'deit': dict(
        backbone=vit(type='DistilledVisionTransformer'),
        neck=None,
        head=dict(type='DeiTClsHead', num_classes=CLASSES, in_channels=8),
    ),
    'smooth': dict(
        head=dict(
            type='LinearClsHead',
            num_classes=CLASSES,
            in_channels=4,
            cal_acc=True,
            loss=dict(type='LabelSmoothLoss', label_smooth_val=0.3, num_classes=CLASSES),
        )
    ),
}


@pytest.mark.parametrize('name', HEADS)
@pytest.mark.filterwarnings('ignore:MMPretrain cannot train')
def test_heads_give_their_own_loss_and_learn(name):
    model = build(**HEADS[name])
    model.init_weights()
    model.train()
    losses = losses_of(model)
    assert set(losses) == {'loss_natural', 'loss_robust'}
    batch = model.data_preprocessor(make_data(), training=False)
    expected = model.head.loss(model.extract_feat(batch['inputs']), batch['data_samples'])['loss']
    torch.testing.assert_close(losses['loss_natural'], expected)
    sum(losses.values()).backward()
    gradients = [p.grad for p in model.head.parameters()]
    assert all(gradient is not None for gradient in gradients) and any(gradient.any() for gradient in gradients)
    # And prediction is MMPretrain's.
    samples = model.val_step(make_data())
    assert all(sample.pred_score.shape == (CLASSES,) for sample in samples)


def linear(**kwargs):
    return dict(head=dict(type='LinearClsHead', num_classes=CLASSES, in_channels=4) | kwargs)


@pytest.mark.parametrize(
    ('overrides', 'error', 'message'),
    [
        (dict(head=None), TypeError, 'head: NoneType cannot serve'),
        (
            dict(head=dict(type='MultiLabelLinearClsHead', num_classes=3, in_channels=4)),
            TypeError,
            'head: MultiLabelLinearClsHead cannot serve a RobustClassifier, which needs one set of class logits',
        ),
        (
            dict(head=dict(type='ArcFaceClsHead', num_classes=3, in_channels=4)),
            TypeError,
            'head: ArcFaceClsHead computes its loss from more than class logits',
        ),
        (
            dict(head=dict(type='ConformerHead', num_classes=3, in_channels=[4, 4])),
            TypeError,
            'head: ConformerHead computes its loss from more than class logits',
        ),
        (linear(loss=dict(type='CrossEntropyLoss', use_sigmoid=True)), TypeError, 'head.loss: CrossEntropyLoss with'),
        (linear(loss=dict(type='FocalLoss')), TypeError, 'head.loss: FocalLoss with a sigmoid'),
        (
            linear(loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='multi_label')),
            TypeError,
            'head.loss: LabelSmoothLoss with a sigmoid',
        ),
        (
            dict(robust_loss=dict(type='TRADEsLoss')),
            ValueError,
            "robust_loss.type='TRADEsLoss' is unknown (did you mean 'TRADESLoss'?); allowed: AdversarialCrossEntr",
        ),
        (
            dict(router_loss=[dict(type='TRADESLoss'), dict(type='RouterLabelsLoss')]),
            ValueError,
            "router_loss.type='RouterLabelsLoss' is unknown (did you mean 'RouterLabelLoss'?)",
        ),
        (
            dict(robust_loss=dict(type='CrossEntropyLoss')),
            TypeError,
            "robust_loss.type='CrossEntropyLoss' is no robust objective; allowed: ['Adv",
        ),
        (dict(robust_loss='TRADESLoss'), TypeError, "robust_loss='TRADESLoss' must be a dict with a type"),
        (dict(robust_loss=[dict(beta=1.0)]), TypeError, "robust_loss={'beta': 1.0} must be a dict with a type"),
        (dict(robust_loss=[]), ValueError, 'robust_loss=[] must hold at least one objective'),
        (dict(router_loss=[]), ValueError, 'router_loss=[] must hold at least one objective'),
        (dict(robust_loss=LABEL, moe=True), ValueError, 'is about router logits alone, from which the experts learn'),
        (
            dict(router_loss=LABEL),
            ValueError,
            'router_loss: RouterLabelLoss is about router logits, but the backbone ResNet_CIFAR has no router',
        ),
        (
            dict(backbone=moe_backbone(num_experts=1), router_loss=dict(type='RouterKLLoss')),
            ValueError,
            'router_loss: RouterKLLoss is about router logits, but the backbone MoEBackbone has no router',
        ),
        (
            dict(moe=True, router_loss=LABEL, train_cfg=dict(augments=dict(type='Mixup', alpha=1.0))),
            ValueError,
            'router_loss: RouterLabelLoss needs class indices as labels, which the batch augmentations (train_cfg',
        ),
    ],
)
def test_what_cannot_serve_is_refused_by_name(overrides, error, message):
    with pytest.raises(error, match=re.escape(message)):
        build(**overrides)


def test_without_adversarial_inputs_it_says_what_to_set():
    model = build(data_preprocessor=dict(type='ClsDataPreprocessor'))
    with pytest.raises(ValueError, match=r"needs adv_inputs.*AdvDataPreprocessor.*mode='pair'"):
        losses_of(model)


def test_objectives_are_summed_and_terms_of_one_name_added():
    trades = dict(type='TRADESLoss', beta=2.0)
    parts = [dict(type='RouterKLLoss', weight=1.0), dict(type='RouterKLLoss', weight=2.0), LABEL]
    together = losses_of(build(moe=True, robust_loss=[trades, *parts]))
    alone = losses_of(build(moe=True, robust_loss=trades))
    kl = losses_of(build(moe=True, robust_loss=[trades, parts[0]]))['loss_route_robust']
    assert set(together) == {'loss_natural', 'loss_robust', 'loss_route_robust', 'loss_route_label'}
    torch.testing.assert_close(together['loss_natural'], alone['loss_natural'])
    torch.testing.assert_close(together['loss_route_robust'], (1 + 2 + 1) * kl)
    assert kl > 0


def test_each_turn_has_its_objective_and_its_names():
    model = build(moe=True, router_loss=[LABEL, dict(type='RouterBalanceLoss')])
    assert set(losses_of(model)) == {'loss_natural', 'loss_robust'}
    assert set(losses_of(model, turn='experts')) == {'loss_natural', 'loss_robust'}
    assert set(losses_of(model, turn='router')) == {'loss_route_label', 'loss_route_robust', 'loss_balance'}
    # The paper's way: one objective for both.
    assert set(losses_of(build(moe=True), turn='router')) == {'loss_natural', 'loss_robust'}


def test_an_objective_of_the_router_alone_runs_no_expert():
    model = build(moe=True, router_loss=LABEL)
    batch = model.data_preprocessor(make_data(), training=True)
    calls = []
    for layer in model.modules():
        if isinstance(layer, ExpertLayer):
            layer.register_forward_hook(lambda *_: calls.append(1))
    model.train()
    losses = model.loss(**batch, turn='router')
    assert not calls
    sum(losses.values()).backward()
    groups = split_parameters(model)
    assert all(p.grad is None for _, p in groups['experts'])
    assert all(p.grad is not None for _, p in groups['router'])
    model.loss(**batch, turn='experts')
    assert len(calls) == 2 * len(model.backbone.expert_layers())


def test_router_objectives_see_what_routing_per_layer_decides():
    model = build(backbone=moe_backbone('layer'), router_loss=LABEL).eval()
    batch = model.data_preprocessor(make_data(), training=True)
    loss = model.loss(**batch, turn='router')['loss_route_label']
    expert = torch.arange(4) % CLASSES % 2
    routings = forward_routed(model, batch['inputs'])[1]
    expected = sum(torch.nn.functional.cross_entropy(r.logits, expert) for r in routings) / len(routings)
    assert len(routings) == model.backbone.num_routers > 1
    torch.testing.assert_close(loss, expected)


def test_routes_of_the_last_step_are_on_record_without_gradients():
    model = build(moe=True, router_loss=LABEL).eval()
    assert model.routing_records == {}
    for turn in ('experts', 'router'):
        batch = model.data_preprocessor(dict(make_data(8), turn=turn), training=True)
        assert batch['turn'] == turn
        model.loss(**batch)
        for inputs, routings in (
            (batch['inputs'], model.routing_records[turn].clean),
            (batch['adv_inputs'], model.routing_records[turn].adversarial),
        ):
            (routing,) = routings
            logits = model.backbone.router(inputs)
            assert routing.expert.equal(logits.argmax(1)) and sum(routing.counts) == 8
            assert not routing.logits.requires_grad and routing.gate is None
    dense = build()
    assert losses_of(dense) and dense.routing_records == {None: RoutingRecord()}


def test_a_loss_that_is_not_finite_is_named_with_its_turn():
    model = build(moe=True)
    batch = model.data_preprocessor(dict(make_data(), turn='experts'), training=True)
    with torch.no_grad():
        model.head.fc.bias[0] = float('inf')
    with pytest.raises(NonFiniteError, match='loss_natural, loss_robust in a turn of the experts'):
        model.loss(**batch)


def test_dense_and_mixture_learn_a_batch():
    for moe in (False, True):
        model = build(moe=moe, data_preprocessor=dict(attack=dict(type='TRADESAttack', eps=0.05)))
        model.train()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        history = []
        for _ in range(30):
            loss = sum(losses_of(model).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        assert sum(history[-3:]) < 0.5 * sum(history[:3]), history


@MODELS.register_module()
class OwnTerm(TRADESLoss):
    def forward(self, batch):
        return dict(super().forward(batch), pairing=batch.clean.logits.square().mean(), norm=torch.zeros(()))


def test_a_term_that_nothing_would_train_is_refused():
    with pytest.raises(ValueError, match="OwnTerm has a term 'pairing', which MMEngine would log and not train"):
        losses_of(build(robust_loss=dict(type='OwnTerm')))
