_base_ = [
    '_base_/models/moe_vgg16-bn_cifar.py',
    '_base_/datasets/tiny-imagenet.py',
    '_base_/attacks/linf_8_255.py',
    '_base_/schedules/advmoe_sgd_200e.py',
    '_base_/advmoe_runtime.py',
]

model = dict(
    data_preprocessor=dict(to_rgb=True, attack=_base_.train_attack, router_attack=_base_.router_attack),
    head=dict(num_classes=200),
    router_loss=_base_.router_loss,
)
