_base_ = 'default_runtime.py'

# What the router learns in its turn, for every AdvMoE config: in the paper, what the experts learn.
router_loss = dict(type='TRADESLoss', beta=6.0)
custom_hooks = [dict(type='AlternatingOptimHook'), *_base_.custom_hooks]
