import pytest
import torch
from mmpretrain.registry import MODELS

from mmadvmoe.cost import count_cost

NETWORK = dict(type='PlainConvNet', in_channels=1, pool=2, widths=(2, 4), strides=(1, 2))


def test_positions_are_kept_and_norms_treat_train_and_test_alike():
    network = MODELS.build(NETWORK)
    images = torch.rand(3, 1, 8, 8)
    (features,) = network.train()(images)
    assert features.shape == (3, 16)
    assert torch.equal(network.eval()(images)[0], features)


def test_a_branch_costs_what_a_router_costs():
    head = dict(type='LinearClsHead', num_classes=10)
    router = dict(type='MLPRouter', image_size=8, in_channels=1, pool=2, hidden=6)
    mixture = dict(type='MoEBackbone', num_experts=2, include=[r'convs\.1\.conv'], router=router, backbone=NETWORK)
    branch = dict(type='SideBranch', image_size=8, in_channels=1, pool=2, hidden=6, backbone=NETWORK)
    costs = {}
    for name, backbone, width in (('mixture', mixture, 16), ('branch', branch, 22), ('alone', NETWORK, 16)):
        model = MODELS.build(dict(type='ImageClassifier', backbone=backbone, head=dict(head, in_channels=width)))
        costs[name] = count_cost(model, (1, 8, 8)).gflops * 1e9
    assert costs['branch'] - costs['alone'] == pytest.approx(16 * 6 + 6 * 10)
    assert costs['mixture'] - costs['alone'] == pytest.approx(16 * 6 + 6 * 2)


@pytest.mark.parametrize(
    ('change', 'error'),
    [
        (dict(strides=(1,)), r'backbone.strides=\(1,\) must be as many as backbone.widths=\(2, 4\)'),
        (dict(widths=(2, 0.5)), r'backbone.widths\[1\]=0.5'),
    ],
)
def test_mistakes_are_named(change, error):
    with pytest.raises(ValueError, match=error):
        MODELS.build({**NETWORK, **change})
