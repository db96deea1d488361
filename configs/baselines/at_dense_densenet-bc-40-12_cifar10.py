_base_ = [
    '../_base_/models/densenet-bc-40-12_cifar.py',
    '../_base_/datasets/cifar10.py',
    '../_base_/attacks/linf_8_255.py',
    '../_base_/schedules/at_sgd_100e.py',
    '../_base_/default_runtime.py',
]

model = dict(data_preprocessor=dict(attack=_base_.train_attack))
