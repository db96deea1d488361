_base_ = [
    '_base_/models/moe_vit-small.py',
    '_base_/datasets/imagenet.py',
    '_base_/attacks/linf_8_255.py',
    '_base_/schedules/advmoe_adamw_100e.py',
    '_base_/advmoe_runtime.py',
]

model = dict(
    data_preprocessor=dict(to_rgb=True, attack=_base_.train_attack, router_attack=_base_.router_attack),
    router_loss=_base_.token_router_loss,
)
