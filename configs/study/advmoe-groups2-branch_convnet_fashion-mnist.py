_base_ = 'advmoe-groups2-small_convnet_fashion-mnist.py'

# A branch into the logits that the experts share; with the small router the whole costs what AT(S-Dense + branch) does.
model = dict(
    backbone=dict(
        include=[r'network\.convs\.\d\.conv'],
        backbone=dict(
            _delete_=True,
            type='SideBranch',
            image_size=28,
            in_channels=1,
            hidden=14,
            pool=2,
            backbone=dict(type='PlainConvNet', in_channels=1, pool=2, widths=(2, 4, 4, 8, 8), strides=(1, 2, 1, 2, 1)),
        ),
    ),
    head=dict(in_channels=142),
)
