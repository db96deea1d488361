import pytest
import torch
import torch.nn.functional as F

from mmadvmoe.moe import ClassGroups, Routing, TokenRouting

GROUPS = [[0, 3], [1], [2, 4]]


def test_experts_by_index_by_name_and_by_remainder():
    labels = torch.arange(5)
    assert ClassGroups(GROUPS).experts_of(labels, 3).tolist() == [0, 1, 2, 0, 2]
    named = ClassGroups([['a', 'd'], ['b'], ['c', 4]], classes=['a', 'b', 'c', 'd', 'e'])
    assert named.experts_of(labels, 3).tolist() == [0, 1, 2, 0, 2]
    assert ClassGroups('modulo').experts_of(labels, 3).tolist() == [0, 1, 2, 0, 1]
    digits = [[str(i) for i in range(5)], [str(i) for i in range(5, 10)]]
    assert ClassGroups(digits, classes='Digits').experts_of(torch.tensor([4, 5]), 2).tolist() == [0, 1]


@pytest.mark.parametrize('groups', [GROUPS, 'modulo'])
def test_class_probabilities_give_each_group_the_mass_of_its_classes(groups):
    groups = ClassGroups(groups)
    labels = torch.tensor([4, 0, 1])
    hard = F.one_hot(labels, 5).float()
    assert torch.equal(groups.experts_of(hard, 3).argmax(1), groups.experts_of(labels, 3))
    mixed = torch.tensor([[0.1, 0.2, 0.3, 0.15, 0.25]])
    expected = [[0.25, 0.2, 0.55]] if groups.num_groups else [[0.25, 0.45, 0.3]]
    torch.testing.assert_close(groups.experts_of(mixed, 3), torch.tensor(expected))


def test_cross_entropy_is_the_mean_over_routers_and_tokens():
    groups, labels = ClassGroups(GROUPS), torch.tensor([3, 2])
    images, tokens = torch.randn(2, 3), torch.randn(2, 4, 3)
    routings = [Routing.decide(images), TokenRouting.decide(tokens, 1)]
    target = torch.tensor([0, 2])
    of_images = -images.log_softmax(1)[[0, 1], target]
    of_tokens = -tokens.log_softmax(2)[[0, 1], :, target].mean(1)
    for given in (labels, F.one_hot(labels, 5).float()):
        torch.testing.assert_close(groups.cross_entropy(routings, given), (of_images + of_tokens) / 2)


@pytest.mark.parametrize(
    ('groups', 'classes', 'error'),
    [
        ('modulus', None, "groups='modulus'.*did you mean 'modulo'"),
        ([[0], [0, 1]], None, 'class 0 is in two groups'),
        ([[0], [2]], None, r'classes \[1\] are in no group'),
        ([['a'], []], ['a', 'b'], 'group 1 is empty'),
        ([['a'], ['b']], ['a', 'b', 'c'], r"classes \['c'\] are in no group"),
        ([['Sandl']], 'FashionMNIST', "did you mean 'Sandal'"),
        ([['a']], 'FashonMNIST', "did you mean 'FashionMNIST'"),
    ],
)
def test_mistakes_are_named(groups, classes, error):
    with pytest.raises(ValueError, match=error):
        ClassGroups(groups, classes)


def test_groups_must_fit_experts_and_classes():
    with pytest.raises(ValueError, match='3 groups do not fit backbone.num_experts=2'):
        ClassGroups(GROUPS).check(2, 5)
    with pytest.raises(ValueError, match='groups holds 5 classes, but head.num_classes=10'):
        ClassGroups(GROUPS).check(3, 10)
    ClassGroups('modulo').check(2, 5)
