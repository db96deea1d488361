_base_ = 'at_dense_resnet18-narrow_cifar10.py'

# Half the width of the dense network: the cost of one pathway of the MoE.
model = dict(backbone=dict(base_channels=8), head=dict(in_channels=64))
