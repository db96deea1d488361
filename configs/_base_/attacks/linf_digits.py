# L-inf, eps 0.2 on 8x8 digits: a fifth of the range of a pixel, at which the methods differ.
# Against the class logits alone: two steps that also push the routes find weaker images for the experts to learn from.
train_attack = dict(type='TRADESAttack', eps=0.2, alpha=0.125, steps=2, router_weight=0.0)
# In the router's turn of a training in turns the routes are under attack as well.
router_attack = dict(type='TRADESAttack', eps=0.2, alpha=0.125, steps=2, router_weight=1.0)

val_cfg = dict(
    type='RobustValLoop',
    chunk_size=180,
    attacks=dict(
        pgd10=dict(type='PGD', eps=0.2, alpha=0.05, steps=10),
        routepgd10=dict(type='RoutePGD', eps=0.2, alpha=0.05, steps=10),
    ),
)
test_cfg = dict(
    type='RobustTestLoop',
    chunk_size=360,
    attacks=dict(
        pgd50=dict(type='PGD', eps=0.2, alpha=0.05, steps=50),
        routepgd50=dict(type='RoutePGD', eps=0.2, alpha=0.05, steps=50),
        autoattack=dict(type='AutoAttack', eps=0.2),
    ),
    # AutoAttack costs most, and can only lower what the others have left standing.
    survivors_only=['autoattack'],
    worst_of=dict(ra=['pgd50', 'routepgd50']),
)
