# DenseNet-BC-40-12 with 2 pathways that grow half as fast; stem and transitions are shared. The network is so cheap
# that a router at full size would cost more than a pathway: it sees the image at half its size.
model = dict(
    type='RobustClassifier',
    data_preprocessor=dict(type='AdvDataPreprocessor', mode='pair'),
    backbone=dict(
        type='MoEBackbone',
        num_experts=2,
        include=[r'stages\.\d\.block\.\d+\.conv\d'],
        routing='image',
        router=dict(type='ResNetRouter', stem_stride=2),
        backbone=dict(type='DenseNet_CIFAR', arch=dict(growth_rate=6, depths=[6, 6, 6], init_channels=24)),
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=69,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
    robust_loss=dict(type='TRADESLoss', beta=6.0),
)
