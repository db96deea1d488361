_base_ = [
    '../_base_/models/resnet18_cifar.py',
    '../_base_/datasets/cifar100.py',
    '../_base_/attacks/linf_8_255.py',
    '../_base_/schedules/at_sgd_100e.py',
    '../_base_/default_runtime.py',
]

model = dict(data_preprocessor=dict(attack=_base_.train_attack), head=dict(num_classes=100))
