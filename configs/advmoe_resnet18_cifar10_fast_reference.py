_base_ = 'advmoe_resnet18_cifar10_fast_stabilised.py'

# The reference code's gate, attacks and learning rate of the router, as in advmoe_resnet18_cifar10_reference.py, for a
# short budget. Where logits of the router are no longer finite the run stops.
model = dict(
    backbone=dict(gate='logit'),
    data_preprocessor=dict(attack=dict(gated=True), router_attack=dict(gated=True)),
)
optim_wrapper = dict(router=dict(optimizer=dict(lr=0.2), clip_grad=None))
custom_hooks = [
    dict(type='AlternatingOptimHook', reuse_batch=True, fixed_in_eval=False),
    *_base_.custom_hooks[1:],
]
