_base_ = 'advmoe_resnet18_digits.py'

# Cheaper: the router learns in every fifth iteration. 75 epochs, of which the experts get 60.
train_cfg = dict(max_epochs=75, val_interval=15)
custom_hooks = [dict(type='AlternatingOptimHook', k_experts=4, k_router=1), *_base_.custom_hooks[1:]]
