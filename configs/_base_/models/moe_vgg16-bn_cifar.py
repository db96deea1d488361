# VGG-16-BN with 2 pathways of half the width; one router on the image. The first convolution is shared.
model = dict(
    type='RobustClassifier',
    data_preprocessor=dict(type='AdvDataPreprocessor', mode='pair'),
    backbone=dict(
        type='MoEBackbone',
        num_experts=2,
        include=[r'features\.\d+\.conv'],
        exclude=[r'features\.0\.'],
        routing='image',
        router=dict(type='ResNetRouter'),
        backbone=dict(type='ScaledVGG', depth=16, base_channels=32, with_last_pool=False),
    ),
    neck=dict(type='AdaptiveAveragePooling', output_size=2),
    head=dict(
        type='StackedLinearClsHead',
        num_classes=10,
        in_channels=1024,
        mid_channels=[256, 256],
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
    robust_loss=dict(type='TRADESLoss', beta=6.0),
)
