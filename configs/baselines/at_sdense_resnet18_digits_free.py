_base_ = 'at_sdense_resnet18_digits.py'

# Cheaper: four steps on each batch, each of which perturbs the images for the next (arXiv:1904.12843). A quarter of the
# epochs.
model = dict(
    _delete_=True,
    type='FreeClassifier',
    eps=0.2,
    replays=4,
    data_preprocessor=dict(type='AdvDataPreprocessor', mode='replace'),
    backbone=dict(type='ResNet_CIFAR', depth=18, stem_channels=16, base_channels=8),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=10, in_channels=64, loss=dict(type='CrossEntropyLoss')),
)
train_cfg = dict(max_epochs=15, val_interval=5)
