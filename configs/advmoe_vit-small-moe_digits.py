_base_ = [
    '_base_/models/moe_vit-small.py',
    '_base_/datasets/digits.py',
    '_base_/attacks/linf_digits.py',
    '_base_/schedules/advmoe_adamw_100e.py',
    '_base_/advmoe_runtime.py',
]

# 16 patches of 2x2 pixels and the class token; 4 blocks of width 64.
model = dict(
    data_preprocessor=dict(attack=_base_.train_attack, router_attack=_base_.router_attack),
    backbone=dict(
        backbone=dict(
            arch=dict(embed_dims=64, num_layers=4, num_heads=4, feedforward_channels=128), img_size=8, patch_size=2
        )
    ),
    head=dict(num_classes=10, in_channels=64),
    router_loss=[*_base_.router_loss, _base_.z_loss],
)
optim_wrapper = dict(experts=dict(optimizer=dict(lr=2e-3)), router=dict(optimizer=dict(lr=2e-3)))
# Twice the epochs of joint training: half of the iterations are the routers'.
train_cfg = dict(max_epochs=80, val_interval=10)
