_base_ = 'moe_wrn-28-10_cifar.py'

# WideResNet-28-10 for ImageNet with 2 pathways of half the width. Only the stem, as narrow, is shared.
# The router sees the image at a quarter of its size: at full size it would cost more than the network.
model = dict(
    backbone=dict(router=dict(stem_stride=4), backbone=dict(type='WideResNet')),
    head=dict(num_classes=1000),
)
