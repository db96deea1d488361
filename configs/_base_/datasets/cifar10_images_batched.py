_base_ = 'cifar10_images.py'

# The training images as one tensor in memory; crops and mirror images are made batch by batch, on the device.
train_dataloader = dict(
    num_workers=0,
    collate_fn=dict(type='keep_batch'),
    dataset=dict(
        _delete_=True,
        type='InMemory',
        dataset=dict(
            type='ImageFolders',
            data_root=_base_.data_root,
            split='train',
            pipeline=[dict(type='PackInputs')],
        ),
    ),
)
# To be set as model.data_preprocessor.augment: what the pipeline of cifar10.py does.
train_augment = dict(type='BatchedCropFlip', padding=4, flip=0.5)
