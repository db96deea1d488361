_base_ = [
    '../_base_/models/moe_vit-small.py',
    '../_base_/datasets/imagenet.py',
    '../_base_/attacks/linf_8_255.py',
    '../_base_/schedules/at_adamw_100e.py',
    '../_base_/default_runtime.py',
]

model = dict(
    data_preprocessor=dict(to_rgb=True, attack=_base_.train_attack),
    robust_loss=[_base_.model.robust_loss, _base_.balance_loss, _base_.z_loss],
)
