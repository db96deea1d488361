_base_ = 'at_sdense_convnet_digits.py'

# Two pathways, each of the size of AT(S-Dense); the objective of the paper for both turns.
model = dict(
    data_preprocessor=dict(router_attack=_base_.router_attack),
    backbone=dict(
        _delete_=True,
        type='MoEBackbone',
        num_experts=2,
        include=[r'convs\.\d\.conv'],
        share_stem=False,
        router=dict(type='MLPRouter', image_size=8, in_channels=1, hidden=16),
        backbone=_base_.model.backbone,
    ),
)
_group = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.2, momentum=0.9, nesterov=True, weight_decay=5e-4),
)
optim_wrapper = dict(
    _delete_=True,
    constructor='AlternatingOptimWrapperConstructor',
    experts=dict(**_group, clip_grad=dict(max_norm=5.0)),
    router=dict(**_group, clip_grad=dict(max_norm=1.0)),
)
# Beside the attacks on the dense networks, one that leaves the routes alone.
test_cfg = dict(
    attacks={'autoattack-held': dict(type='AutoAttack', eps=0.1, route='held')},
    survivors_only=['autoattack', 'autoattack-held'],
)
# Half of the iterations are the experts': as many steps for them as in 160 epochs of joint training.
train_cfg = dict(max_epochs=320, val_interval=40)
custom_hooks = [dict(type='AlternatingOptimHook'), *_base_.custom_hooks]
