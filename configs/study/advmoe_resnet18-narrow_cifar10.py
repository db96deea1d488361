_base_ = [
    '../_base_/models/moe_resnet18_cifar.py',
    '../_base_/datasets/cifar10_images_small.py',
    '../_base_/attacks/linf_8_255.py',
    '../_base_/schedules/advmoe_onecycle_60e.py',
    '../_base_/fast.py',
]

# A quarter of the width of advmoe_resnet18_cifar10_fast.py, for two CPU cores.
model = dict(
    data_preprocessor=dict(
        attack=_base_.train_attack,
        router_attack=_base_.router_attack,
        augment=_base_.train_augment,
    ),
    backbone=dict(router=dict(base_channels=4), backbone=dict(stem_channels=16, base_channels=8)),
    head=dict(in_channels=64),
    router_loss=_base_.router_loss,
)
# 15 epochs for each side; weights are averaged over about 100 iterations of each.
_rise = dict(type='LinearLR', start_factor=0.04, begin=0, end=8, by_epoch=True, convert_to_iter_based=True)
_fall = dict(type='CosineAnnealingLR', eta_min=0, begin=8, end=30, T_max=22, by_epoch=True, convert_to_iter_based=True)
param_scheduler = dict(experts=[_rise, _fall], router=[_rise, _fall])
optim_wrapper = dict(experts=dict(optimizer=dict(lr=0.1)), router=dict(optimizer=dict(lr=0.01)))
train_cfg = dict(max_epochs=30, val_interval=10)
# AutoAttack on small batches takes nearly as long as on large ones.
test_cfg = dict(chunk_size=1000)
custom_hooks = [
    *_base_.custom_hooks[:-1],
    dict(type='EMAHook', ema_type='ExponentialMovingAverage', momentum=0.005, begin_epoch=10),
]
