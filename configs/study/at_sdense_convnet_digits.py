_base_ = 'at_dense_convnet_digits.py'

# Half the width of the dense network: the cost of one pathway of the mixtures.
model = dict(backbone=dict(widths=(2, 4, 4, 8, 8)), head=dict(in_channels=32))
