_base_ = [
    '../_base_/models/moe_vit-small.py',
    '../_base_/datasets/cifar10.py',
    '../_base_/attacks/linf_8_255.py',
    '../_base_/schedules/at_adamw_100e.py',
    '../_base_/default_runtime.py',
]

# 64 patches of 4x4 pixels.
model = dict(
    data_preprocessor=dict(attack=_base_.train_attack),
    backbone=dict(backbone=dict(img_size=32, patch_size=4)),
    head=dict(num_classes=10),
    robust_loss=[_base_.model.robust_loss, _base_.balance_loss, _base_.z_loss],
)
