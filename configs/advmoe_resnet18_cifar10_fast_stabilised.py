_base_ = 'advmoe_resnet18_cifar10_fast.py'

# The router objective and the schedule of the reference code, as in advmoe_resnet18_cifar10_stabilised.py; 30 epochs,
# in which both sides step on each batch.
model = dict(
    data_preprocessor=dict(attack=_base_.router_attack),
    router_loss=[dict(type='RouterLabelLoss', alpha=6.0, beta=6.0)],
)
_rise = dict(type='LinearLR', start_factor=0.04, begin=0, end=8, by_epoch=True, convert_to_iter_based=True)
_fall = dict(type='CosineAnnealingLR', eta_min=0, begin=8, end=30, T_max=22, by_epoch=True, convert_to_iter_based=True)
param_scheduler = dict(_delete_=True, experts=[_rise, _fall], router=[_rise, _fall])
train_cfg = dict(max_epochs=30, val_interval=10)
custom_hooks = [dict(type='AlternatingOptimHook', reuse_batch=True), *_base_.custom_hooks[1:]]
