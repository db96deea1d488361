# VGG-16-BN for robust training: 13 convolutions, average pooling to 2x2, three linear layers.
model = dict(
    type='RobustClassifier',
    data_preprocessor=dict(type='AdvDataPreprocessor', mode='pair'),
    backbone=dict(type='ScaledVGG', depth=16, base_channels=64, with_last_pool=False),
    neck=dict(type='AdaptiveAveragePooling', output_size=2),
    head=dict(
        type='StackedLinearClsHead',
        num_classes=10,
        in_channels=2048,
        mid_channels=[256, 256],
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
    robust_loss=dict(type='TRADESLoss', beta=6.0),
)
