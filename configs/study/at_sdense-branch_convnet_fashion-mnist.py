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
        backbone=dict(type='PlainConvNet', in_channels=1, pool=2, widths=(2, 4, 4, 8, 8), strides=(1, 2, 1, 2, 1)),
    ),
    head=dict(in_channels=144),
)
