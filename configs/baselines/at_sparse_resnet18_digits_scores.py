_base_ = 'at_dense_resnet18_digits.py'

# First stage of the pruned network: which channels to keep, learned with the weights fixed. It starts from the dense
# network: --cfg-options load_from=<checkpoint of at_dense_resnet18_digits.py>
model = dict(
    type='SparseClassifier',
    stage='scores',
    input_size=8,
    # The pathway of advmoe_resnet18_digits.py, whose cost is to be matched.
    target=dict(backbone=dict(base_channels=8), head=dict(in_channels=64)),
)
train_cfg = dict(max_epochs=30, val_interval=10)
