# Fashion-MNIST: 55,000 images to train on, 5,000 of the training set to select on, the 10,000 official test images for
# the result. One channel of 28x28, in memory.
data_root = 'data/fashion-mnist'

train_dataloader = dict(
    batch_size=256,
    num_workers=0,
    persistent_workers=False,
    # A last batch of one image would leave batch norm without a variance.
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    collate_fn=dict(type='keep_batch'),
    dataset=dict(
        type='InMemory',
        dataset=dict(type='FashionMNISTSplit', data_root=data_root, split='train', pipeline=[dict(type='PackInputs')]),
    ),
)
# To be set as model.data_preprocessor.augment: mirror images.
train_augment = dict(type='BatchedCropFlip', padding=0, flip=0.5)

val_dataloader = dict(
    batch_size=250,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='FashionMNISTSplit', data_root=data_root, split='val', pipeline=[dict(type='PackInputs')]),
)
val_evaluator = dict(type='Accuracy', topk=(1,))

test_dataloader = dict(
    batch_size=250,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='FashionMNISTSplit', data_root=data_root, split='test', pipeline=[dict(type='PackInputs')]),
)
test_evaluator = val_evaluator
