_base_ = [
    '_base_/models/moe_resnet18_cifar.py',
    '_base_/datasets/cifar10_batched.py',
    '_base_/attacks/linf_8_255.py',
    '_base_/schedules/advmoe_onecycle_60e.py',
    '_base_/fast.py',
]

# For a short budget: 30 epochs for each side on a one-cycle schedule, batches made on the device, averaged weights.
model = dict(
    data_preprocessor=dict(
        attack=_base_.train_attack,
        router_attack=_base_.router_attack,
        augment=_base_.train_augment,
    ),
    router_loss=_base_.router_loss,
)
