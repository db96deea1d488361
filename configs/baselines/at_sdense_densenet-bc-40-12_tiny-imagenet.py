_base_ = 'at_dense_densenet-bc-40-12_tiny-imagenet.py'

# Half the width of the dense network: the cost of one pathway of the MoE.
model = dict(backbone=dict(arch=dict(growth_rate=6)), head=dict(in_channels=69))
