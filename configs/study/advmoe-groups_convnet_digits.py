_base_ = 'advmoe_convnet_digits.py'

# The router learns to tell apart groups of digits that an attack seldom confuses; experts learn with the route held.
groups = [[0, 6], [1, 2, 3, 4, 5, 7, 8, 9]]
model = dict(
    route='held',
    data_preprocessor=dict(
        attack=dict(route='held'),
        router_attack=dict(_delete_=True, type='ClassGroupAttack', groups=groups, eps=0.1, alpha=0.05, steps=4),
    ),
    router_loss=dict(type='ClassGroupLoss', groups=groups),
)
