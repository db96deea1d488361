_base_ = 'cifar10.py'

# The training images as one tensor in memory; crops and mirror images are made batch by batch, on the device.
train_dataloader = dict(
    num_workers=0,
    collate_fn=dict(type='keep_batch'),
    dataset=dict(
        _delete_=True,
        type='InMemory',
        dataset=dict(
            type='CIFAR10Split',
            data_root=_base_.data_root,
            split='train',
            # Leaves images as they are, and says their size.
            pipeline=[dict(type='CenterCrop', crop_size=32), dict(type='PackInputs')],
        ),
    ),
)
# To be set as model.data_preprocessor.augment: what the pipeline of cifar10.py does.
train_augment = dict(type='BatchedCropFlip', padding=4, flip=0.5)
