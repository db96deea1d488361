# Tiny-ImageNet: 200 classes at 64x64; 95,000 images to train on, 5,000 of the training set to select on, the 10,000
# official validation images for the result.
data_root = 'data/tiny-imagenet'

train_dataloader = dict(
    batch_size=128,
    num_workers=4,
    # With persistent workers, a resumed run could not draw the augmentations that an uninterrupted
    # one draws.
    persistent_workers=False,
    worker_init_fn=dict(type='seed_worker'),
    # A last batch of one image would leave batch norm without a variance.
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='TinyImageNet',
        data_root=data_root,
        split='train',
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='RandomCrop', crop_size=64, padding=4),
            dict(type='RandomFlip', prob=0.5, direction='horizontal'),
            dict(type='PackInputs'),
        ],
    ),
)
# The learning rates of the schedules are meant for 128 images an iteration on all GPUs together.
auto_scale_lr = dict(enable=False, base_batch_size=128)

val_dataloader = dict(
    batch_size=128,
    num_workers=2,
    persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='TinyImageNet',
        data_root=data_root,
        split='val',
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='PackInputs'),
        ],
    ),
)
val_evaluator = dict(type='Accuracy', topk=(1,))

test_dataloader = dict(
    batch_size=128,
    num_workers=2,
    persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='TinyImageNet',
        data_root=data_root,
        split='test',
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='PackInputs'),
        ],
    ),
)
test_evaluator = val_evaluator
