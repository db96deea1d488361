# scikit-learn's handwritten digits: 1,257 images to train on, 180 to select on, 360 to test on.
train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    persistent_workers=False,
    # A last batch of one image would leave batch norm without a variance.
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='Digits',
        split='train',
        pipeline=[
            # No flip: a mirrored digit is another sign.
            dict(type='RandomCrop', crop_size=8, padding=1),
            dict(type='PackInputs'),
        ],
    ),
)

val_dataloader = dict(
    batch_size=180,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='Digits', split='val', pipeline=[dict(type='PackInputs')]),
)
val_evaluator = dict(type='Accuracy', topk=(1,))

test_dataloader = dict(
    batch_size=180,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='Digits', split='test', pipeline=[dict(type='PackInputs')]),
)
test_evaluator = val_evaluator
