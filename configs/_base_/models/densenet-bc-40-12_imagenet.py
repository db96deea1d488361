# DenseNet-BC-40-12 for robust training on ImageNet: 7x7 stem of stride 2 and max pooling.
model = dict(
    type='RobustClassifier',
    data_preprocessor=dict(type='AdvDataPreprocessor', mode='pair'),
    backbone=dict(type='DenseNet', arch=dict(growth_rate=12, depths=[6, 6, 6], init_channels=24)),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=132,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
    robust_loss=dict(type='TRADESLoss', beta=6.0),
)
