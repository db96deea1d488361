_base_ = 'advmoe_resnet18_digits.py'

# Each group learns at adversarially perturbed weights of its own. The first quarter of its 1,140 updates is plain.
optim_wrapper = dict(
    experts=dict(type='AWPOptimWrapper', gamma=5e-3, warmup_iters=285),
    router=dict(type='AWPOptimWrapper', gamma=5e-3, warmup_iters=285),
)
