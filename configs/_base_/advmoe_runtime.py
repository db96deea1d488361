_base_ = 'default_runtime.py'

# What the router learns in its turn, for every AdvMoE config. The first term is the paper's objective, that of the
# experts. By itself it does not care how many experts are used nor whether an attack moves the route; the other two do.
router_loss = [
    dict(type='TRADESLoss', beta=6.0),
    dict(type='RouterBalanceLoss', weight=20.0),
    dict(type='RouterKLLoss', weight=6.0),
]
custom_hooks = [dict(type='AlternatingOptimHook'), *_base_.custom_hooks]
