# CIFAR ResNet-18 with 2 pathways of half the width; one router on the image. The stem and the shortcuts are shared.
model = dict(
    type='RobustClassifier',
    data_preprocessor=dict(type='AdvDataPreprocessor', mode='pair'),
    backbone=dict(
        type='MoEBackbone',
        num_experts=2,
        include=[r'layer\d\.\d+\.conv\d'],
        routing='image',
        router=dict(type='ResNetRouter'),
        backbone=dict(type='ResNet_CIFAR', depth=18, stem_channels=64, base_channels=32),
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=256,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
    robust_loss=dict(type='TRADESLoss', beta=6.0),
)
