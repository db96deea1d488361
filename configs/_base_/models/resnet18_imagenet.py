_base_ = 'resnet18_cifar.py'

# ResNet-18 for robust training on ImageNet: 7x7 stem of stride 2 and max pooling.
model = dict(backbone=dict(type='ResNet'), head=dict(num_classes=1000))
