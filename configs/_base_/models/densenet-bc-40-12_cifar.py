# DenseNet-BC-40-12 for robust training: 3x3 stem of 24, 3 blocks of 6 dense layers that add 12 channels each.
model = dict(
    type='RobustClassifier',
    data_preprocessor=dict(type='AdvDataPreprocessor', mode='pair'),
    backbone=dict(type='DenseNet_CIFAR', arch=dict(growth_rate=12, depths=[6, 6, 6], init_channels=24)),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=132,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
    robust_loss=dict(type='TRADESLoss', beta=6.0),
)
