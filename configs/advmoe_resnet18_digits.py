_base_ = [
    '_base_/models/moe_resnet18_cifar.py',
    '_base_/datasets/digits.py',
    '_base_/attacks/linf_digits.py',
    '_base_/schedules/advmoe_sgd_200e.py',
    '_base_/advmoe_runtime.py',
]

# A quarter of the widths of the CIFAR network, the router included.
model = dict(
    data_preprocessor=dict(attack=_base_.train_attack, router_attack=_base_.router_attack),
    backbone=dict(router=dict(base_channels=4), backbone=dict(stem_channels=16, base_channels=8)),
    head=dict(in_channels=64),
    router_loss=_base_.router_loss,
)
# Half of the iterations are the experts': as many steps for them as in 60 epochs of joint training.
train_cfg = dict(max_epochs=120, val_interval=20)
