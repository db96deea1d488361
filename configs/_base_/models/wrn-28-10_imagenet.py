_base_ = 'wrn-28-10_cifar.py'

# WideResNet-28-10 for robust training on ImageNet: 7x7 stem of stride 2 and max pooling.
model = dict(backbone=dict(type='WideResNet'), head=dict(num_classes=1000))
