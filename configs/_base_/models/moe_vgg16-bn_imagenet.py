_base_ = 'moe_vgg16-bn_cifar.py'

# VGG-16-BN for ImageNet with 2 pathways of half the width. The first convolution is shared.
# The router sees the image at a quarter of its size: at full size it would cost more than the network.
model = dict(backbone=dict(router=dict(stem_stride=4)), head=dict(num_classes=1000))
