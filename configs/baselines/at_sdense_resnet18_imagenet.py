_base_ = 'at_dense_resnet18_imagenet.py'

# Half the width of the dense network: the cost of one pathway of the MoE.
model = dict(backbone=dict(stem_channels=32, base_channels=32), head=dict(in_channels=256))
