_base_ = 'at_sgd_100e.py'

# The rate rises for a quarter of the time, then falls to nothing; see advmoe_onecycle_60e.py.
param_scheduler = [
    dict(type='LinearLR', start_factor=0.04, begin=0, end=8, by_epoch=True, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=0, begin=8, end=30, T_max=22, by_epoch=True, convert_to_iter_based=True),
]
optim_wrapper = dict(optimizer=dict(lr=0.2))
train_cfg = dict(max_epochs=30, val_interval=10)
