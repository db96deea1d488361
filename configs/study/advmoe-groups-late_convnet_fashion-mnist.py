_base_ = 'advmoe-groups_convnet_fashion-mnist.py'

# Experts in the last two convolutions only, as in arXiv:2509.05086; the other three are shared.
model = dict(backbone=dict(include=[r'convs\.[34]\.conv']))
