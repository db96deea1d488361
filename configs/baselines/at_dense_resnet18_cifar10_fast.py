_base_ = [
    '../_base_/models/resnet18_cifar.py',
    '../_base_/datasets/cifar10_batched.py',
    '../_base_/attacks/linf_8_255.py',
    '../_base_/schedules/at_onecycle_30e.py',
    '../_base_/fast.py',
]

# As many updates as the experts get in advmoe_resnet18_cifar10_fast.py.
model = dict(data_preprocessor=dict(attack=_base_.train_attack, augment=_base_.train_augment))
custom_hooks = _base_.joint_hooks
