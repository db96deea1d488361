_base_ = 'at_sdense_convnet_fashion-mnist.py'

# What the larger routers cost is spent on a branch of that size into the logits.
model = dict(
    backbone=dict(
        _delete_=True,
        type='SideBranch',
        image_size=28,
        in_channels=1,
        hidden=16,
        pool=2,
        backbone=_base_.model.backbone,
    ),
    head=dict(in_channels=144),
)
