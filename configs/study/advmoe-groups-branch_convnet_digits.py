_base_ = 'advmoe-groups_convnet_digits.py'

# A branch into the logits that the experts share; it and the router together cost what the branch of AT(S-Dense) does.
model = dict(
    backbone=dict(
        include=[r'network\.convs\.\d\.conv'],
        router=dict(hidden=8),
        backbone=dict(
            _delete_=True,
            type='SideBranch',
            image_size=8,
            in_channels=1,
            hidden=8,
            backbone=_base_.model.backbone.backbone,
        ),
    ),
    head=dict(in_channels=40),
)
