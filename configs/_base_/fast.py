_base_ = 'advmoe_runtime.py'

# A GPU's fast units, and weights averaged over about the last 1,000 iterations, which short schedules gain from. Mixed
# precision is --amp; the attacks of training run in it, too, and may find somewhat less than in float32. Not
# cudnn_benchmark: it would try all algorithms anew for each number of images of an expert.
env_cfg = dict(cudnn_benchmark=False)
_fast = [
    dict(type='SpeedHook'),
    dict(type='EMAHook', ema_type='ExponentialMovingAverage', momentum=0.001, begin_epoch=10),
]
custom_hooks = [*_base_.custom_hooks, *_fast]
# For training of all parameters together.
joint_hooks = [*_base_.custom_hooks[1:], *_fast]
