"""Every backbone of MMPretrain as a mixture: experts are the dense network with their weights, or layers are named."""

import copy
import re

import mmpretrain.models.backbones as backbones
import pytest
import torch
from mmpretrain.registry import MODELS

import mmadvmoe  # noqa: F401
from mmadvmoe.moe import deployable, match_ffns
from mmadvmoe.moe.expert_layers import EXPERT_LAYERS


def vit(**kwargs):
    arch = dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32)
    return dict(img_size=32, patch_size=16, arch=arch, **kwargs), 32


def stages(**kwargs):
    return dict(embed_dims=[8] * 4, depths=[1] * 4, **kwargs)


def pools():
    return dict(
        arch=dict(layers=[1] * 4, embed_dims=[4, 8, 12, 16], mlp_ratios=[2] * 4, layer_scale_init_value=0.1)
    ), 32


TWINS = dict(num_heads=[1] * 4, patch_sizes=[4, 2, 2, 2], strides=[4, 2, 2, 2], mlp_ratios=[2] * 4)
WINDOWS = dict(embed_dims=8, depths=[1] * 4, num_heads=[1] * 4)
# The cheapest variant of each: its config and the size of an image.
SMALL = {
    'AlexNet': (dict(), 64),
    'BEiTViT': vit(),
    'ConvMixer': (dict(arch=dict(embed_dims=8, depth=2, patch_size=4, kernel_size=3)), 32),
    'ConvNeXt': (dict(arch=dict(depths=[1] * 4, channels=[4, 8, 8, 8])), 32),
    'Conformer': (dict(arch=dict(embed_dims=24, channel_ratio=1, num_heads=2, depths=3)), 64),
    'DaViT': (dict(arch=WINDOWS, window_size=2), 64),
    'DeiT3': vit(),
    'DenseNet': (dict(arch=dict(growth_rate=4, depths=[1] * 4, init_channels=8)), 32),
    'DistilledVisionTransformer': vit(),
    'EdgeNeXt': (dict(arch=dict(channels=[8, 16, 16, 16], depths=[1] * 4, num_heads=[2] * 4)), 64),
    'EfficientFormer': (
        dict(
            arch=dict(layers=[1, 1, 1, 2], embed_dims=[8, 8, 8, 16], downsamples=[False, True, True, True], vit_num=1)
        ),
        224,
    ),
    'HorNet': (
        dict(arch=dict(base_dim=8, depths=[1] * 4, orders=[2] * 4, dw_cfg=[dict(type='DW', kernel_size=3)] * 4)),
        64,
    ),
    'LeNet5': (dict(), 32),
    'MViT': (dict(arch=dict(embed_dims=8, num_layers=2, num_heads=1, downscale_indices=[1]), img_size=32), 32),
    'MixMIMTransformer': (dict(arch=WINDOWS, img_size=64, window_size=[2] * 4, drop_rate=0.0), 64),
    'MlpMixer': (
        dict(
            arch=dict(embed_dims=16, num_layers=2, tokens_mlp_dims=8, channels_mlp_dims=16), img_size=32, patch_size=16
        ),
        32,
    ),
    'MobileNetV2': (dict(widen_factor=0.25), 32),
    'MobileNetV3': (dict(arch='small_050'), 32),
    'MobileViT': (dict(arch='xx_small'), 32),
    'PCPVT': (dict(arch=stages(sr_ratios=[8, 4, 2, 1], **TWINS)), 64),
    'PoolFormer': pools(),
    'RIFormer': pools(),
    'RegNet': (dict(arch=dict(w0=8, wa=8.0, wm=2.0, group_w=8, depth=6, bot_mul=1.0)), 32),
    'RepLKNet': (
        dict(arch=dict(large_kernel_sizes=[5] * 4, layers=[1] * 4, channels=[8] * 4, small_kernel=3, dw_ratio=1)),
        64,
    ),
    'RepMLPNet': (
        dict(
            arch=dict(channels=[16] * 4, depths=[1] * 4, sharesets_nums=[1] * 4), img_size=64, reparam_conv_kernels=(1,)
        ),
        64,
    ),
    'RepVGG': (
        dict(
            arch=dict(num_blocks=[1] * 4, width_factor=[0.125] * 4, group_layer_map=None, se_cfg=None, stem_channels=8)
        ),
        32,
    ),
    'ResNeXt': (dict(depth=50, groups=4, width_per_group=4, base_channels=8), 32),
    'ResNet': (dict(depth=18, base_channels=8, stem_channels=8), 32),
    'ResNetV1c': (dict(depth=50, base_channels=8), 32),
    'ResNetV1d': (dict(depth=50, base_channels=8), 32),
    'ResNet_CIFAR': (dict(depth=18, base_channels=8), 32),
    'RevVisionTransformer': vit(no_custom_backward=True),
    'SEResNeXt': (dict(depth=50, groups=4, width_per_group=4, base_channels=16), 32),
    'SEResNet': (dict(depth=50, base_channels=16), 32),
    'SVT': (dict(arch=stages(sr_ratios=[4, 2, 1, 1], window_sizes=[4, 4, 2, 2], **TWINS)), 64),
    'ShuffleNetV1': (dict(groups=2, widen_factor=0.5), 32),
    'ShuffleNetV2': (dict(widen_factor=0.5), 32),
    'SwinTransformer': (dict(arch=WINDOWS, img_size=64, window_size=2), 64),
    'SwinTransformerV2': (
        dict(arch=dict(WINDOWS, extra_norm_every_n_blocks=0), img_size=64, window_size=[2] * 4),
        64,
    ),
    'T2T_ViT': (
        dict(
            img_size=32,
            embed_dims=16,
            num_layers=2,
            t2t_cfg=dict(token_dims=8, use_performer=False),
            layer_cfgs=dict(num_heads=2, feedforward_channels=32),
        ),
        32,
    ),
    'TNT': (
        dict(
            arch=dict(embed_dims_outer=16, embed_dims_inner=8, num_layers=1, num_heads_outer=2, num_heads_inner=2),
            img_size=32,
        ),
        32,
    ),
    'TinyViT': (
        dict(arch=dict(channels=[8] * 4, num_heads=[1] * 4, depths=[1] * 4), img_size=(64, 64), window_size=[2] * 4),
        64,
    ),
    'VAN': (dict(arch=stages(ffn_ratios=[2] * 4)), 32),
    'ViTEVA02': vit(),
    'ViTSAM': (
        dict(
            arch=dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32, global_attn_indexes=[1]),
            img_size=64,
            window_size=2,
        ),
        64,
    ),
    'VisionTransformer': vit(),
    'XCiT': (
        dict(
            embed_dims=16,
            depth=2,
            num_heads=2,
            patch_size=8,
            mlp_ratio=2,
            cls_attn_layers=1,
            tokens_norm=True,
            out_type='cls_token',
        ),
        32,
    ),
}
# By layer too: those whose layers read images, tokens, vectors, windows or all channels of a patch.
LAYERS = 'ConvNeXt EdgeNeXt LeNet5 MobileViT RepMLPNet ResNet SwinTransformer VisionTransformer'.split()
# As small as they come; of these, the last twelve layers get experts, with one router for the image.
LARGE = {
    'CSPDarkNet': (dict(depth=53), 32),
    'CSPResNeXt': (dict(depth=50), 32),
    'CSPResNet': (dict(depth=50), 32),
    'EfficientNet': (dict(arch='b0'), 32),
    'EfficientNetV2': (dict(arch='s'), 32),
    'HRNet': (dict(arch='w18'), 64),
    'HiViT': (dict(arch='tiny', img_size=64), 64),
    'InceptionV3': (dict(aux_logits=True), 96),
    'LeViT': (dict(arch='128s', img_size=64), 64),
    'MobileOne': (dict(arch='s0'), 32),
    'Res2Net': (dict(depth=50, scales=4, base_width=26), 32),
    'ResNeSt': (dict(depth=50), 32),
    'VGG': (dict(depth=11, norm_cfg=dict(type='BN')), 32),
    'Vig': (dict(arch='tiny'), 224),
}
ELSEWHERE = {
    'CSPNet': 'the base of those above',
    'PyramidVig': 'the blocks of Vig, at 224 pixels alone and too slow',
    'SparseConvNeXt': 'needs the mask of SparK, which pretrains; nothing classifies with it',
    'SparseResNet': 'needs the mask of SparK, which pretrains; nothing classifies with it',
    'TIMMBackbone': 'needs timm',
}
TOKENS = (
    'BEiTViT Conformer ConvNeXt DaViT DeiT3 DistilledVisionTransformer EdgeNeXt MixMIMTransformer MlpMixer MobileViT '
    'PCPVT RevVisionTransformer SVT SwinTransformer SwinTransformerV2 T2T_ViT TNT ViTSAM VisionTransformer XCiT'
).split()
# Those that compute position encodings in float32, whatever the type of the weights.
SINGLE = {'EdgeNeXt', 'XCiT'}
# All their feed-forward networks are given parts of images.
NO_TOKENS = {'MobileViT'}
# What a layer that cannot hold experts is refused with, by its name.
REFUSED = r"(?:the expert layer )?'([^']+)' (?:is given \d+ rows for \d+ images|of \w+ cannot hold)"


def test_every_backbone_is_here():
    assert {*SMALL, *LARGE, *ELSEWHERE} == set(backbones.__all__)


def type_for(name):
    return torch.float32 if name in SINGLE else torch.float64


def tolerance(images):
    return dict(rtol=1e-3, atol=1e-4) if images.dtype == torch.float32 else dict(rtol=1e-6, atol=1e-8)


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [each for part in value or () for each in tensors(part)] if isinstance(value, (tuple, list)) else []


def alike(names, name):
    """Those that differ from ``name`` in numbers alone."""
    kind = re.sub(r'\d+', '#', name)
    return {each for each in names if re.sub(r'\d+', '#', each) == kind}


def build(cfg, names, routing, images):
    """A mixture with experts in all layers that can hold them, and its features; the others must be refused by name."""
    kinds = dict(image=dict(type='ResNetRouter', num_blocks=1, base_channels=2, in_channels=images.shape[1]))
    left = set(names)
    while left:
        try:
            mixture = MODELS.build(
                dict(
                    type='MoEBackbone',
                    num_experts=2,
                    include=[f'^{re.escape(name)}$' for name in names if name in left],
                    routing=routing,
                    router=kinds.get(routing),
                    backbone=copy.deepcopy(cfg),
                )
            )
            mixture = mixture.to(images.dtype)
            generator = torch.Generator().manual_seed(1)
            for parameter in mixture.network.parameters():  # scales that begin at zero would hide what is inside
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
            mixture.eval()  # where some attention layers keep what they make of their weights
            return mixture, tensors(
                mixture.forward_routed(images, None if routing == 'token' else torch.tensor([0, 1]))[0]
            )
        except ValueError as error:
            found = re.search(REFUSED, str(error))
            assert found, error
            assert found[1] in left
            left -= alike(names, found[1])
    raise AssertionError('no layer is left')


def with_weights(dense, mixture, expert):
    """The dense network, given the weights of one expert."""
    own = dense.state_dict()
    shared = mixture.network.state_dict()
    for name, layer in zip(mixture.expert_layer_names, mixture.expert_layers()):
        shared.update({f'{name}.{key}': view for key, view in layer.expert_parameters(expert).items()})
    for key, value in own.items():
        value.copy_(shared[key])
    dense.train()
    dense.eval()
    return dense


def check_pathways(name, settings, routing, layers=None):
    kwargs, size = settings
    torch.manual_seed(0)
    cfg = dict(type=name, **kwargs)
    dense = MODELS.build(copy.deepcopy(cfg)).to(type_for(name))
    names = [key for key, module in dense.named_modules() if type(module) in EXPERT_LAYERS][1:][-(layers or 0) :]
    images = torch.rand(2, 1 if name == 'LeNet5' else 3, size, size).to(type_for(name))
    with torch.no_grad():
        mixture, features = build(cfg, names, routing, images)
        assert features
        different = False
        for expert in (0, 1):
            expected = tensors(with_weights(dense, mixture, expert)(images))
            assert len(expected) == len(features)
            for got, wanted in zip(features, expected, strict=True):
                torch.testing.assert_close(got[expert], wanted[expert], **tolerance(images))
                different |= not torch.allclose(got[1 - expert], wanted[1 - expert])
        assert different, 'both experts compute the same'
        # All experts of one kind: the dense network, whatever the routers say.
        for layer in mixture.expert_layers():
            for key, view in layer.expert_parameters(1).items():
                view.copy_(layer.expert_parameters(0)[key])
        mixture.train()
        mixture.eval()
        for got, wanted in zip(tensors(mixture(images)), tensors(with_weights(dense, mixture, 0)(images)), strict=True):
            torch.testing.assert_close(got, wanted, **tolerance(images))


@pytest.mark.parametrize(('name', 'routing'), [*((n, 'image') for n in SMALL), *((n, 'layer') for n in LAYERS)])
def test_each_expert_is_the_dense_network_with_its_weights(name, routing):
    check_pathways(name, SMALL[name], routing)


@pytest.mark.parametrize('name', LARGE)
def test_late_layers_of_large_networks_can_hold_experts(name):
    check_pathways(name, LARGE[name], 'image', layers=12)


@pytest.mark.parametrize('name', SMALL)
def test_tokens_are_routed_as_if_all_experts_were_computed_or_refused(name):
    kwargs, size = SMALL[name]
    torch.manual_seed(0)
    cfg = dict(type=name, **kwargs)
    network = MODELS.build(copy.deepcopy(cfg))
    if name not in TOKENS:
        with pytest.raises(ValueError, match=f'{name} has none .*; use routing='):
            match_ffns(network, ['.'])
        return
    names = match_ffns(network, ['.'])
    images = torch.rand(2, 3, size, size).to(type_for(name))
    with torch.no_grad():
        if name in NO_TOKENS:
            with pytest.raises(AssertionError, match='no layer is left'):
                build(cfg, names, 'token', images)
            return
        mixture, features = build(cfg, names, 'token', images)
        for got, wanted in zip(features, tensors(deployable(mixture)(images)), strict=True):
            torch.testing.assert_close(got, wanted, **tolerance(images))


def test_layers_that_are_computed_anew_are_refused_by_the_key():
    cfg = dict(type='RevVisionTransformer', **vit()[0])
    with pytest.raises(ValueError, match=r'set backbone\.backbone\.no_custom_backward=True'):
        MODELS.build(dict(type='MoEBackbone', num_experts=2, include=['ffn'], backbone=cfg))


def test_a_network_whose_blocks_load_by_themselves_is_upcycled_and_loaded(tmp_path):
    """The blocks of RepVGG get the ``init_cfg`` of the network, and nothing comes back from ``eval()``."""
    kwargs, size = SMALL['RepVGG']
    dense = MODELS.build(dict(type='RepVGG', **kwargs))
    torch.save(dict(state_dict=dense.state_dict()), tmp_path / 'dense.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'dense.pth'))
    cfg = dict(
        type='MoEBackbone',
        num_experts=2,
        include=[r'stage_\d.*conv$'],
        router=dict(type='ResNetRouter', num_blocks=1, base_channels=2),
        backbone=dict(type='RepVGG', init_cfg=init_cfg, **kwargs),
    )
    mixture, loaded = MODELS.build(copy.deepcopy(cfg)), MODELS.build(copy.deepcopy(cfg))
    mixture.init_weights()
    loaded.load_state_dict(mixture.state_dict())
    dense.eval(), mixture.eval(), loaded.eval()
    images = torch.rand(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(mixture(images), dense(images))
        torch.testing.assert_close(loaded(images), mixture(images))
