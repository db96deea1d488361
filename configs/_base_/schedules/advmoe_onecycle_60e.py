_base_ = 'advmoe_sgd_200e.py'

# 30 epochs for each side: the rate rises for a quarter of the time, then falls to nothing. Not OneCycleLR, whose state
# holds a function, which no checkpoint may.
_rise = dict(type='LinearLR', start_factor=0.04, begin=0, end=15, by_epoch=True, convert_to_iter_based=True)
_fall = dict(type='CosineAnnealingLR', eta_min=0, begin=15, end=60, T_max=45, by_epoch=True, convert_to_iter_based=True)
param_scheduler = dict(_delete_=True, experts=[_rise, _fall], router=[_rise, _fall])
optim_wrapper = dict(experts=dict(optimizer=dict(lr=0.2)), router=dict(optimizer=dict(lr=0.02)))
train_cfg = dict(max_epochs=60, val_interval=20)
