_base_ = 'moe_resnet18_cifar.py'

# ResNet-18 for ImageNet with 2 pathways of half the width; blocks and shortcuts hold experts, only the stem is shared.
# The router sees the image at a quarter of its size: at full size it would cost more than the network.
model = dict(
    backbone=dict(
        include=[r'layer\d\.\d+\.conv\d', r'layer\d\.\d+\.downsample\.0'],
        router=dict(stem_stride=4),
        backbone=dict(type='ResNet', stem_channels=32),
    ),
    head=dict(num_classes=1000),
)
