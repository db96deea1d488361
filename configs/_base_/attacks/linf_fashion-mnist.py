# L-inf, eps 0.05 on images in [0, 1].
# Against the class logits alone: two steps that also push the routes find weaker images for the experts to learn from.
train_attack = dict(type='TRADESAttack', eps=0.05, alpha=0.03125, steps=2, router_weight=0.0)
# In the router's turn of a training in turns the routes are under attack as well.
router_attack = dict(type='TRADESAttack', eps=0.05, alpha=0.03125, steps=2, router_weight=1.0)

val_cfg = dict(
    type='RobustValLoop',
    attacks=dict(
        pgd10=dict(type='PGD', eps=0.05, alpha=0.0125, steps=10),
        routepgd10=dict(type='RoutePGD', eps=0.05, alpha=0.0125, steps=10),
    ),
)
test_cfg = dict(
    type='RobustTestLoop',
    attacks=dict(
        pgd50=dict(type='PGD', eps=0.05, alpha=0.0125, steps=50, restarts=3),
        routepgd50=dict(type='RoutePGD', eps=0.05, alpha=0.0125, steps=50),
        autoattack=dict(type='AutoAttack', eps=0.05),
    ),
    # The networks are so small that many images at once cost hardly more than few.
    chunk_size=500,
    # AutoAttack costs most, and can only lower what the others have left standing.
    survivors_only=['autoattack'],
    worst_of=dict(ra=['pgd50', 'routepgd50']),
)
