# WideResNet-28-10 with 2 pathways of half the width; one router on the image. Only the stem, as narrow, is shared.
model = dict(
    type='RobustClassifier',
    data_preprocessor=dict(type='AdvDataPreprocessor', mode='pair'),
    backbone=dict(
        type='MoEBackbone',
        num_experts=2,
        include=[r'layer\d\.\d+\.conv\d', r'layer\d\.\d+\.shortcut'],
        routing='image',
        router=dict(type='ResNetRouter'),
        backbone=dict(type='WideResNet_CIFAR', depth=28, widen_factor=10, base_channels=8),
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=320,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
    robust_loss=dict(type='TRADESLoss', beta=6.0),
)
