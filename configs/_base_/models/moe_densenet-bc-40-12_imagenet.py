_base_ = 'moe_densenet-bc-40-12_cifar.py'

# DenseNet-BC-40-12 for ImageNet with 2 pathways that grow half as fast; stem and transitions are shared. The network
# is so cheap that the router is small and sees the image at an eighth of its size.
model = dict(
    backbone=dict(router=dict(stem_stride=8, num_blocks=1), backbone=dict(type='DenseNet')),
    head=dict(num_classes=1000),
)
