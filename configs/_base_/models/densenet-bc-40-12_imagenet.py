_base_ = 'densenet-bc-40-12_cifar.py'

# DenseNet-BC-40-12 for robust training on ImageNet: 7x7 stem of stride 2 and max pooling.
model = dict(backbone=dict(type='DenseNet'), head=dict(num_classes=1000))
