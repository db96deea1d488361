import mmpretrain.engine  # noqa: F401  (registers the constructor)
from mmpretrain.registry import MODELS

from mmadvmoe.training.optim_constructor import AlternatingOptimWrapperConstructor


def test_transformers_train_with_layer_wise_decay_per_group():
    arch = dict(embed_dims=16, num_layers=4, num_heads=2, feedforward_channels=32)
    backbone = dict(
        type='MoEBackbone',
        num_experts=2,
        include=[r'layers\.[13]\.ffn'],
        routing='token',
        backbone=dict(type='VisionTransformer', arch=arch, img_size=8, patch_size=4),
    )
    model = MODELS.build(
        dict(
            type='ImageClassifier',
            backbone=backbone,
            head=dict(type='LinearClsHead', num_classes=4, in_channels=16),
        )
    )
    group = dict(
        constructor='mmpretrain.LearningRateDecayOptimWrapperConstructor',
        optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.05),
        paramwise_cfg=dict(layer_decay_rate=0.5, bias_decay_mult=0.0),
    )
    wrapper = AlternatingOptimWrapperConstructor(dict(experts=group, router=group))(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates, decays = {}, {}
    for member in wrapper.values():
        for part in member.optimizer.param_groups:
            for parameter in part['params']:
                name = names[id(parameter)]
                rates[name], decays[name] = part['lr'], part['weight_decay']
    blocks = {n: [rate for name, rate in rates.items() if f'.network.layers.{n}.' in name] for n in range(4)}
    assert all(len(set(found)) == 1 for found in blocks.values())
    assert [blocks[n + 1][0] / blocks[n][0] for n in range(3)] == [2.0] * 3
    # Experts and gate of a block go with the block; stacked biases are still biases.
    prefix = 'backbone.network.layers.3.ffn.layers'
    assert rates[f'{prefix}.router.weight'] == rates[f'{prefix}.experts.layers.1.weight'] == blocks[3][0]
    assert decays[f'{prefix}.experts.layers.1.weight'] == 0.05 and decays[f'{prefix}.experts.layers.1.bias'] == 0
    assert set(rates) == set(names.values())
