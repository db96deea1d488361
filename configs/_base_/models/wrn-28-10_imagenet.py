# WideResNet-28-10 for robust training on ImageNet: 7x7 stem of stride 2 and max pooling, widths 160/320/640.
model = dict(
    type='RobustClassifier',
    data_preprocessor=dict(type='AdvDataPreprocessor', mode='pair'),
    backbone=dict(type='WideResNet', depth=28, widen_factor=10, base_channels=16),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=640,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
    robust_loss=dict(type='TRADESLoss', beta=6.0),
)
