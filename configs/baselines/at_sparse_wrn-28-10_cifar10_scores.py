_base_ = 'at_dense_wrn-28-10_cifar10.py'

# First stage of the pruned network: which channels to keep, learned with the weights fixed. It starts from the dense
# network: --cfg-options load_from=<checkpoint of at_dense_wrn-28-10_cifar10.py>
model = dict(
    type='SparseClassifier',
    stage='scores',
    input_size=32,
    # The pathway of advmoe_wrn-28-10_cifar10.py, whose cost is to be matched.
    target=dict(backbone=dict(base_channels=8), head=dict(in_channels=320)),
)
train_cfg = dict(max_epochs=20, val_interval=5)
