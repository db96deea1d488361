import copy
import pickle

import pytest
import torch
from mmengine.model import ExponentialMovingAverage, MMDistributedDataParallel
from mmpretrain.registry import MODELS
from torch import nn
from torch.optim.swa_utils import AveragedModel

from mmadvmoe.attacks import NormalizedClassifier, Victim, build_attack
from mmadvmoe.moe import Routing, deployable


def flags(model):
    return (
        {name: module.training for name, module in model.named_modules()},
        {name: p.requires_grad for name, p in model.named_parameters()},
    )


def test_normalises_like_the_data_preprocessor(make_moe):
    stats = dict(mean=[120.0, 110.0, 100.0], std=[50.0, 60.0, 70.0])
    model = make_moe(data_preprocessor=stats).eval()
    pixels = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    inputs = model.data_preprocessor(dict(inputs=pixels))['inputs']
    logits = Victim(model)(pixels / 255)
    torch.testing.assert_close(logits, model(inputs))
    assert build_attack(dict(type='PGD'), model).victim(pixels / 255).equal(logits)


def test_unnormalised_preprocessor_keeps_the_scale_of_pixels(make_moe):
    model = make_moe(data_preprocessor=dict()).eval()
    images = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(Victim(model)(images), model(images * 255))


def test_what_is_normalised_already_takes_no_second_opinion(make_tiny):
    model = NormalizedClassifier(make_tiny(5)[0].classifier, num_classes=5)
    assert Victim(model, num_classes=5).num_classes == 5
    with pytest.raises(ValueError, match='num_classes=7, but the NormalizedClassifier has num_classes=5'):
        Victim(model, num_classes=7)
    with pytest.raises(TypeError, match='a Victim normalises by itself'):
        Victim(Victim(model), nn.Identity())


def test_the_mode_is_that_of_the_classifier(make_tiny):
    model = NormalizedClassifier(make_tiny()[0].classifier.train())
    assert model.training
    model.classifier.eval()
    assert not model.training
    assert model.train().classifier.training


def test_own_normalize_takes_precedence(make_tiny):
    class Halving(nn.Module):
        def normalize(self, images):
            return images / 2

    victim, images, _ = make_tiny()
    halved = Victim(victim.classifier, Halving())
    torch.testing.assert_close(halved(images), victim(images / 2))


@pytest.mark.parametrize(('routing', 'routers'), [('image', 1), ('layer', 8)])
def test_routes_are_read_held_and_forced(make_moe, routing, routers):
    model = make_moe(routing).eval()
    victim = Victim(model)
    assert (victim.num_classes, victim.num_experts, victim.num_routers) == (4, 2, routers)
    images = torch.rand(6, 3, 8, 8)
    logits, routings = victim.forward_routed(images)
    assert len(routings) == routers
    assert all(isinstance(routing, Routing) for routing in routings)
    torch.testing.assert_close(logits, victim(images))
    route = torch.stack([routing.expert for routing in routings], dim=1)
    held, held_routings = victim.forward_routed(images, route)
    torch.testing.assert_close(held, logits)
    for ours, theirs in zip(held_routings, routings, strict=True):
        torch.testing.assert_close(ours.logits, theirs.logits)
    forced, _ = victim.forward_routed(images, 1 - route)
    assert not torch.allclose(forced, logits, atol=1e-4)
    assert victim.forward_routed(images, route, with_logits=False)[1][0].logits is None


def test_dense_model_has_no_routes(make_tiny):
    victim, images, _ = make_tiny()
    assert (victim.num_experts, victim.num_routers, victim.num_classes) == (1, 0, 5)
    logits, routings = victim.forward_routed(images)
    assert routings == ()
    torch.testing.assert_close(logits, victim(images))
    with pytest.raises(ValueError, match='no router'):
        victim.forward_routed(images, torch.zeros(4, dtype=torch.int64))


def test_a_view_is_no_module_but_answers_for_the_classifier(make_moe):
    model = make_moe()
    victim = Victim(model)
    assert not isinstance(victim, nn.Module)
    assert [id(p) for p in victim.parameters()] == [id(p) for p in model.parameters()]
    victim.eval()
    assert not victim.training
    assert not any(module.training for module in model.modules())
    victim.train()
    assert victim.training
    assert model.head.training


def test_frozen_restores_every_flag_after_an_exception(make_moe):
    model = make_moe()
    # A mixture that no call of train() would bring back.
    model.backbone.network.layer2.eval()
    model.backbone.network.layer1[0].bn1.eval()
    model.backbone.router.requires_grad_(False)
    before = flags(model)
    victim = Victim(model)
    with pytest.raises(KeyError, match='inside'), victim.frozen():
        assert not any(flag for part in flags(model) for flag in part.values())
        with victim.frozen():
            pass
        assert not any(flag for part in flags(model) for flag in part.values())
        model.train()
        model.requires_grad_(True)
        raise KeyError('inside')
    assert flags(model) == before


def test_deep_copy_of_a_robust_classifier_attacks_the_copy(make_moe):
    attack = dict(type='TRADESAttack')
    model = make_moe(
        classifier='RobustClassifier',
        data_preprocessor=dict(type='AdvDataPreprocessor', attack=attack),
    )
    # A plain attribute, which registers nothing and closes no circle of submodules.
    model.data_preprocessor.view = Victim(model)
    twin = copy.deepcopy(model)
    victim = twin.data_preprocessor.view
    assert victim.classifier is twin and model.data_preprocessor.view.classifier is model
    twin.data_preprocessor.mean.fill_(100.0)
    assert victim.model.normalize(torch.rand(2, 3, 8, 8)).min() < -0.1
    assert len(list(model.modules())) == len(list(twin.modules()))
    assert not any('view' in key for key in model.state_dict())


def test_takes_a_distributed_wrapper_off(make_tiny, tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        victim, _, _ = make_tiny()
        wrapped = MMDistributedDataParallel(victim.classifier)
        assert Victim(wrapped).classifier is victim.classifier
    finally:
        torch.distributed.destroy_process_group()


def test_logits_are_full_precision_under_autocast(make_tiny):
    victim, images, _ = make_tiny()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert victim.classifier(images).dtype == torch.bfloat16
        assert victim(images).dtype == torch.float32


def test_class_count_of_a_classifying_backbone(make_tiny, make_moe):
    """MMPretrain's VGG with its own classifier, for one, has a head that knows no class count."""
    classifier = make_tiny()[0].classifier
    del classifier.head.num_classes
    assert Victim(classifier).num_classes is None
    # That of a module of someone else may mean anything.
    classifier.backbone.num_classes = 7
    assert Victim(classifier).num_classes is None
    ours = make_moe()
    del ours.head.num_classes
    ours.backbone.num_classes = 7
    assert Victim(ours).num_classes == 7


def test_refuses_what_gives_no_logits(make_tiny, make_moe):
    victim, images, _ = make_tiny()

    class TwoHeads(nn.Linear):
        def forward(self, x):
            return super().forward(x), super().forward(x)

    victim.classifier.head = TwoHeads(64, 5)
    with pytest.raises(TypeError, match='TwoHeads gives tuple'):
        victim(images)
    headless = make_moe()
    headless.head = None
    with pytest.raises(TypeError, match='ImageClassifier has no head'):
        Victim(headless)
    with pytest.raises(TypeError, match='type Linear does not tell'):
        Victim(nn.Flatten(), nn.Linear(1, 1))


def test_a_mixture_whose_routes_would_not_be_seen_is_refused(make_moe):
    for wrapped in (nn.Sequential(make_moe()), ExponentialMovingAverage(make_moe()), AveragedModel(make_moe())):
        assert Victim(wrapped).num_routers == 1
    with pytest.raises(ValueError, match='inside of Sequential, where attacks would not see its routes'):
        Victim(nn.Sequential(nn.Identity(), make_moe()))
    hooked = nn.Sequential(make_moe())
    hooked.register_forward_hook(lambda _, inputs, logits: -logits)
    with pytest.raises(ValueError, match='inside of Sequential'):
        Victim(hooked)
    for plain in (deployable(NormalizedClassifier(make_moe())), deployable(make_moe())):
        with pytest.raises(ValueError, match=r'instead of a deployable\(\) copy attack the model it was made from'):
            Victim(plain)


@pytest.fixture
def normalized(make_moe):
    stats = dict(type='AdvDataPreprocessor', mean=[120.0, 110.0, 100.0], std=[50.0, 60.0, 70.0])
    model = NormalizedClassifier(make_moe(classifier='RobustClassifier', data_preprocessor=stats))
    nn.init.normal_(model.classifier.head.fc.weight)
    return model.eval()


def test_the_submodules_are_seen(normalized):
    assert 'ResNet_CIFAR' in repr(normalized) and 'LinearClsHead' in repr(normalized)
    seen = []
    normalized.apply(seen.append)
    assert len(seen) == len(list(normalized.classifier.modules())) + 1 == len(dict(normalized.named_modules()))
    # Nothing twice: the classifier's own data preprocessor is its submodule and no other's.
    assert set(normalized.state_dict()) == {f'classifier.{key}' for key in normalized.classifier.state_dict()}
    assert [name for name, _ in normalized.named_children()] == ['classifier']
    given = NormalizedClassifier(nn.Flatten(), normalized.classifier.data_preprocessor)
    assert [name for name, _ in given.named_children()] == ['classifier', 'preprocessor']


def test_state_dict_round_trip(normalized):
    images = torch.rand(4, 3, 8, 8)
    expected = normalized(images).detach()
    other = copy.deepcopy(normalized)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert not torch.allclose(other(images), expected)
    assert torch.equal(normalized(images), expected)
    other.load_state_dict(normalized.state_dict())
    assert torch.equal(other(images), expected)


def test_is_a_module_among_modules(normalized, tmp_path):
    images = torch.rand(4, 3, 8, 8)
    expected = normalized(images).detach()
    torch.save(normalized, tmp_path / 'model.pth')
    copies = dict(
        sequential=nn.Sequential(normalized),
        deepcopy=copy.deepcopy(normalized),
        pickle=pickle.loads(pickle.dumps(normalized)),
        save=torch.load(tmp_path / 'model.pth', weights_only=False),
    )
    adversarial = {}
    for name, model in copies.items():
        assert torch.equal(model(images), expected), name
        adversarial[name] = build_attack(dict(type='PGD', eps=0.1), model)(images, expected.argmax(1), seed=0)
        if name != 'sequential':
            assert model.classifier.data_preprocessor is not normalized.classifier.data_preprocessor
            assert {id(p) for p in model.parameters()}.isdisjoint(id(p) for p in normalized.parameters())
    assert all(torch.equal(adversarial['sequential'], each) for each in adversarial.values())
    assert copies['deepcopy'].to(torch.float64)(images.double()).dtype == torch.float64


def test_a_copy_made_inside_a_freeze_is_not_held_by_it(normalized):
    with normalized.frozen():
        twin = copy.deepcopy(normalized)
        twin.requires_grad_(True)
        with twin.frozen():
            assert not any(p.requires_grad for p in twin.parameters())
        assert all(p.requires_grad for p in twin.parameters())
        assert not any(p.requires_grad for p in normalized.parameters())
    assert all(p.requires_grad for p in normalized.parameters())


@pytest.mark.parametrize('routing', ['image', 'layer'])
@pytest.mark.parametrize('batch', [1, 4])
def test_gradients_are_contiguous_whatever_the_routes(make_moe, routing, batch):
    """torchattacks flattens gradients with view()."""
    victim = Victim(make_moe(routing).eval())
    nn.init.normal_(victim.classifier.head.fc.weight)
    images = torch.rand(batch, 3, 8, 8)
    labels = victim(images).argmax(1)
    for layout in (torch.contiguous_format, torch.channels_last):
        points = images.to(memory_format=layout).requires_grad_()
        with victim.frozen():
            one_route = victim.forward_routed(points, torch.zeros(batch, dtype=torch.int64))[0]
            router = victim.decide_routes(points)[0].logits[:, 0]
            for outputs in (victim(points), one_route, router):
                assert torch.autograd.grad(outputs.sum(), points)[0].is_contiguous()
    for cfg in (dict(type='PGDL2', steps=2), dict(type='SparseFool', steps=2), dict(type='DeepFool', steps=2)):
        assert build_attack(cfg, victim)(images, labels, seed=0).shape == images.shape


@pytest.mark.parametrize('name', ['PGD', 'TRADESAttack', 'AutoAttack'])
def test_activation_checkpointing_is_off_while_attacked_and_on_again(name):
    backbone = dict(type='ResNet_CIFAR', depth=18, base_channels=4, stem_channels=4)
    head = dict(type='LinearClsHead', num_classes=4, in_channels=32)
    model = MODELS.build(
        dict(type='ImageClassifier', backbone=backbone, neck=dict(type='GlobalAveragePooling'), head=head)
    )
    saving = copy.deepcopy(model)
    for module in saving.modules():
        if hasattr(module, 'with_cp'):
            module.with_cp = True
    images, labels = torch.rand(4, 3, 8, 8), torch.arange(4)
    cfg = dict(type=name, eps=0.1, steps=2) | (dict(attacks_to_run=['apgd-ce']) if name == 'AutoAttack' else {})
    ours, theirs = (build_attack(cfg, Victim(each))(images, labels, seed=0) for each in (model, saving))
    assert ours.equal(theirs) and not ours.equal(images)
    assert saving.backbone.layer1[0].with_cp
