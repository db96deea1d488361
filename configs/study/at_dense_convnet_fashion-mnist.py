_base_ = [
    '../_base_/datasets/fashion-mnist.py',
    '../_base_/attacks/linf_fashion-mnist.py',
    '../_base_/schedules/at_sgd_100e.py',
    '../_base_/default_runtime.py',
]

# So small that capacity decides: 117,648 multiply-adds for an image.
model = dict(
    type='RobustClassifier',
    data_preprocessor=dict(type='AdvDataPreprocessor', attack=_base_.train_attack, augment=_base_.train_augment),
    backbone=dict(type='PlainConvNet', in_channels=1, pool=2, widths=(4, 8, 8, 16, 16), strides=(1, 2, 1, 2, 1)),
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=256,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
    robust_loss=dict(type='TRADESLoss', beta=6.0),
)
optim_wrapper = dict(optimizer=dict(lr=0.2, nesterov=True), clip_grad=dict(max_norm=5.0))
train_cfg = dict(max_epochs=15, val_interval=5)
val_dataloader = dict(dataset=dict(indices=1000))
# AutoAttack takes minutes for them.
test_dataloader = dict(dataset=dict(indices=1000))
