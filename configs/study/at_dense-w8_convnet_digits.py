_base_ = 'at_dense_convnet_digits.py'

# Twice the width of the dense network, for the curve of robust accuracy against cost.
model = dict(backbone=dict(widths=(8, 16, 16, 32, 32)), head=dict(in_channels=128))
