_base_ = [
    '../_base_/datasets/digits.py',
    '../_base_/attacks/linf_digits_small.py',
    '../_base_/schedules/at_sgd_100e.py',
    '../_base_/default_runtime.py',
]

# A dense network so small that capacity decides: 33,792 multiply-adds. Images have one channel, as the scans do, lie in
# memory, and are not moved: of crops by a pixel, small routers learnt little.
_pipeline = [dict(type='RandomGrayscale', prob=1.0), dict(type='PackInputs')]
train_dataloader = dict(
    batch_size=128,
    collate_fn=dict(type='keep_batch'),
    dataset=dict(_delete_=True, type='InMemory', dataset=dict(type='Digits', split='train', pipeline=_pipeline)),
)
val_dataloader = dict(dataset=dict(pipeline=_pipeline))
test_dataloader = dict(dataset=dict(pipeline=_pipeline))

model = dict(
    type='RobustClassifier',
    data_preprocessor=dict(type='AdvDataPreprocessor', attack=_base_.train_attack),
    backbone=dict(type='PlainConvNet', in_channels=1, widths=(4, 8, 8, 16, 16), strides=(1, 2, 1, 2, 1)),
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=64,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
    robust_loss=dict(type='TRADESLoss', beta=6.0),
)
optim_wrapper = dict(optimizer=dict(lr=0.2, nesterov=True), clip_grad=dict(max_norm=5.0))
train_cfg = dict(max_epochs=160, val_interval=20)
default_hooks = dict(checkpoint=dict(interval=20))
