_base_ = [
    '../_base_/models/moe_resnet18_cifar.py',
    '../_base_/datasets/digits.py',
    '../_base_/attacks/linf_digits.py',
    '../_base_/schedules/at_sgd_100e.py',
    '../_base_/default_runtime.py',
]

model = dict(
    data_preprocessor=dict(attack=_base_.train_attack),
    backbone=dict(router=dict(base_channels=4), backbone=dict(stem_channels=16, base_channels=8)),
    head=dict(in_channels=64),
)
train_cfg = dict(max_epochs=60, val_interval=10)
