_base_ = 'advmoe-groups_convnet_fashion-mnist.py'

# The router learns first, in half of the iterations, and is frozen while the experts learn in the other half.
custom_hooks = [
    dict(type='AlternatingOptimHook', router_first_iters=15 * 214, k_router=0),
    *_base_.custom_hooks[1:],
]
param_scheduler = dict(
    _delete_=True,
    experts=dict(
        type='CosineAnnealingLR', eta_min=0, begin=15, T_max=15, end=30, by_epoch=True, convert_to_iter_based=True
    ),
    router=dict(type='CosineAnnealingLR', eta_min=0, T_max=15, end=15, by_epoch=True, convert_to_iter_based=True),
)
