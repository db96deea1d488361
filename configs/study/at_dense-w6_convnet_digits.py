_base_ = 'at_dense_convnet_digits.py'

# One and a half times the width of the dense network, for the curve of robust accuracy against cost.
model = dict(backbone=dict(widths=(6, 12, 12, 24, 24)), head=dict(in_channels=96))
