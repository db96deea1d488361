_base_ = [
    '_base_/models/moe_vit-small.py',
    '_base_/datasets/cifar10.py',
    '_base_/attacks/linf_8_255.py',
    '_base_/schedules/advmoe_adamw_100e.py',
    '_base_/advmoe_runtime.py',
]

# 64 patches of 4x4 pixels.
model = dict(
    data_preprocessor=dict(attack=_base_.train_attack, router_attack=_base_.router_attack),
    backbone=dict(backbone=dict(img_size=32, patch_size=4)),
    head=dict(num_classes=10),
    router_loss=_base_.token_router_loss,
)
