_base_ = 'cifar10.py'

# ImageNet-1k at 224x224: 10,000 images of the training set to select on, the 50,000 official validation images for
# the result.
data_root = 'data/imagenet'
_evaluated = dict(
    type='ImageNetSplit',
    data_root=data_root,
    pipeline=[
        dict(type='LoadImageFromFile'),
        dict(type='ResizeEdge', scale=256, edge='short'),
        dict(type='CenterCrop', crop_size=224),
        dict(type='PackInputs'),
    ],
)
train_dataloader = dict(
    num_workers=8,
    dataset=dict(
        type='ImageNetSplit',
        data_root=data_root,
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='RandomResizedCrop', scale=224),
            dict(type='RandomFlip', prob=0.5, direction='horizontal'),
            dict(type='PackInputs'),
        ],
    ),
)
val_dataloader = dict(num_workers=4, dataset=_evaluated)
test_dataloader = dict(num_workers=4, dataset=_evaluated)
