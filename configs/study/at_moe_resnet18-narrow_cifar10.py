_base_ = 'at_dense_resnet18-narrow_cifar10.py'

# The network of advmoe_resnet18-narrow_cifar10.py, all its parameters trained in every iteration.
model = dict(
    backbone=dict(
        _delete_=True,
        type='MoEBackbone',
        num_experts=2,
        include=[r'layer\d\.\d+\.conv\d'],
        routing='image',
        router=dict(type='ResNetRouter', base_channels=4),
        backbone=dict(type='ResNet_CIFAR', depth=18, stem_channels=16, base_channels=8),
    ),
    head=dict(in_channels=64),
)
