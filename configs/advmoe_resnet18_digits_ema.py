_base_ = 'advmoe_resnet18_digits.py'

# Evaluated and saved: the moving average of experts and router, over the last half of the training.
custom_hooks = [
    *_base_.custom_hooks,
    dict(type='EMAHook', ema_type='ExponentialMovingAverage', momentum=0.002, begin_epoch=60),
]
