_base_ = 'at_dense_convnet_digits.py'

# Three quarters of the width of the dense network, for the curve of robust accuracy against cost.
model = dict(backbone=dict(widths=(3, 6, 6, 12, 12)), head=dict(in_channels=48))
