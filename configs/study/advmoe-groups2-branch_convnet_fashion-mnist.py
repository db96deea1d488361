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
            backbone=_base_.model.backbone.backbone,
        ),
    ),
    head=dict(in_channels=142),
)
