_base_ = 'at_dense_resnet18_cifar10_fast.py'

# Half the width of the dense network: the cost of one pathway of the MoE.
model = dict(backbone=dict(base_channels=32), head=dict(in_channels=256))
