_base_ = 'default_runtime.py'

# What the router learns in its turn, for every AdvMoE config. The first term is the paper's objective, that of the
# experts. By itself it does not care how many experts are used, how clearly an image has one, nor whether an attack
# moves the route; the others do.
router_loss = [
    dict(type='TRADESLoss', beta=6.0),
    dict(type='RouterGlobalEntropyLoss', weight=20.0),
    dict(type='RouterLocalEntropyLoss', weight=20.0),
    dict(type='RouterKLLoss', weight=20.0),
]
custom_hooks = [dict(type='AlternatingOptimHook'), *_base_.custom_hooks]
