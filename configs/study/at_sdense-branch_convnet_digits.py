_base_ = 'at_sdense_convnet_digits.py'

# What the routers cost is spent on a branch of that size into the logits.
model = dict(
    backbone=dict(
        _delete_=True, type='SideBranch', image_size=8, in_channels=1, hidden=16, backbone=_base_.model.backbone
    ),
    head=dict(in_channels=48),
)
