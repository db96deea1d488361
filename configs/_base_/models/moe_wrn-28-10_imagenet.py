# WideResNet-28-10 for ImageNet with 2 pathways of half the width. Only the stem, as narrow, is shared.
# The router sees the image at a quarter of its size: at full size it would cost more than the network.
model = dict(
    type='RobustClassifier',
    data_preprocessor=dict(type='AdvDataPreprocessor', mode='pair'),
    backbone=dict(
        type='MoEBackbone',
        num_experts=2,
        include=[r'layer\d\.\d+\.conv\d', r'layer\d\.\d+\.shortcut'],
        routing='image',
        router=dict(type='ResNetRouter', stem_stride=4),
        backbone=dict(type='WideResNet', depth=28, widen_factor=10, base_channels=8),
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=320,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
    robust_loss=dict(type='TRADESLoss', beta=6.0),
)
