_base_ = 'at_sdense-branch_convnet_fashion-mnist.py'

# A branch that costs what the small router of advmoe-groups2-small does.
model = dict(backbone=dict(hidden=2), head=dict(in_channels=130))
