_base_ = [
    '../_base_/models/resnet18_cifar.py',
    '../_base_/datasets/cifar10_images_small.py',
    '../_base_/attacks/linf_8_255.py',
    '../_base_/schedules/at_onecycle_30e.py',
    '../_base_/fast.py',
]

# A quarter of the width of at_dense_resnet18_cifar10_fast.py, for two CPU cores.
model = dict(
    data_preprocessor=dict(attack=_base_.train_attack, augment=_base_.train_augment),
    backbone=dict(stem_channels=16, base_channels=16),
    head=dict(in_channels=128),
)
# 15 epochs; weights are averaged over about 100 iterations.
param_scheduler = [
    dict(type='LinearLR', start_factor=0.04, begin=0, end=4, by_epoch=True, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=0, begin=4, end=15, T_max=11, by_epoch=True, convert_to_iter_based=True),
]
optim_wrapper = dict(optimizer=dict(lr=0.1))
train_cfg = dict(max_epochs=15, val_interval=5)
# AutoAttack on small batches takes nearly as long as on large ones.
test_cfg = dict(chunk_size=1000)
custom_hooks = [
    *_base_.joint_hooks[:-1],
    dict(type='EMAHook', ema_type='ExponentialMovingAverage', momentum=0.01, begin_epoch=5),
]
