_base_ = 'vgg16-bn_cifar.py'

# VGG-16-BN for robust training on ImageNet: that for CIFAR, with a larger picture to average to 2x2.
model = dict(head=dict(num_classes=1000))
