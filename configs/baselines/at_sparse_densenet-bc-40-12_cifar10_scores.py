_base_ = 'at_dense_densenet-bc-40-12_cifar10.py'

# First stage of the pruned network: which channels to keep, learned with the weights fixed. It starts from the dense
# network: --cfg-options load_from=<checkpoint of at_dense_densenet-bc-40-12_cifar10.py>
model = dict(
    type='SparseClassifier',
    stage='scores',
    input_size=32,
    # The pathway of advmoe_densenet-bc-40-12_cifar10.py, whose cost is to be matched.
    target=dict(backbone=dict(arch=dict(growth_rate=6)), head=dict(in_channels=69)),
)
train_cfg = dict(max_epochs=20, val_interval=5)
