_base_ = 'cifar10.py'

# Tiny-ImageNet: 200 classes at 64x64; 95,000 images to train on, 5,000 of the training set to select on, the 10,000
# official validation images for the result.
data_root = 'data/tiny-imagenet'
_evaluated = dict(
    type='TinyImageNet',
    data_root=data_root,
    pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')],
)
train_dataloader = dict(
    dataset=dict(
        type='TinyImageNet',
        data_root=data_root,
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='RandomCrop', crop_size=64, padding=4),
            dict(type='RandomFlip', prob=0.5, direction='horizontal'),
            dict(type='PackInputs'),
        ],
    ),
)
val_dataloader = dict(dataset=_evaluated)
test_dataloader = dict(dataset=_evaluated)
