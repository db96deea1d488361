_base_ = [
    '../_base_/models/vit-small.py',
    '../_base_/datasets/digits.py',
    '../_base_/attacks/linf_digits.py',
    '../_base_/schedules/at_adamw_100e.py',
    '../_base_/default_runtime.py',
]

# 2 blocks of width 64 on 16 patches and the class token. Patches are 2 pixels apart and overlap: with so few images, a
# transformer learns little from patches of 2x2 pixels.
model = dict(
    data_preprocessor=dict(attack=_base_.train_attack),
    backbone=dict(
        arch=dict(embed_dims=64, num_layers=2, num_heads=4, feedforward_channels=256),
        img_size=8,
        patch_size=2,
        patch_cfg=dict(kernel_size=4, padding=1),
    ),
    head=dict(num_classes=10, in_channels=64),
)
optim_wrapper = dict(optimizer=dict(lr=3e-3))
train_cfg = dict(max_epochs=50, val_interval=5)
