# VGG-16-BN for ImageNet with 2 pathways of half the width. The first convolution is shared.
# The router sees the image at a quarter of its size: at full size it would cost more than the network.
model = dict(
    type='RobustClassifier',
    data_preprocessor=dict(type='AdvDataPreprocessor', mode='pair'),
    backbone=dict(
        type='MoEBackbone',
        num_experts=2,
        include=[r'features\.\d+\.conv'],
        exclude=[r'features\.0\.'],
        routing='image',
        router=dict(type='ResNetRouter', stem_stride=4),
        backbone=dict(type='ScaledVGG', depth=16, base_channels=32, with_last_pool=False),
    ),
    neck=dict(type='AdaptiveAveragePooling', output_size=2),
    head=dict(
        type='StackedLinearClsHead',
        num_classes=1000,
        in_channels=1024,
        mid_channels=[256, 256],
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
    robust_loss=dict(type='TRADESLoss', beta=6.0),
)
