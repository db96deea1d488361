# L-inf, eps 8/255 on images in [0, 1]: the threat model of the paper on CIFAR, Tiny-ImageNet and ImageNet.
# Against the class logits alone: two steps that also push the routes find weaker images for the experts to learn from.
train_attack = dict(type='TRADESAttack', eps=8 / 255, alpha=5 / 255, steps=2, router_weight=0.0)
# In the router's turn of a training in turns the routes are under attack as well.
router_attack = dict(type='TRADESAttack', eps=8 / 255, alpha=5 / 255, steps=2, router_weight=1.0)

val_cfg = dict(
    type='RobustValLoop',
    attacks=dict(
        pgd10=dict(type='PGD', eps=8 / 255, alpha=2 / 255, steps=10),
        routepgd10=dict(type='RoutePGD', eps=8 / 255, alpha=2 / 255, steps=10),
    ),
)
test_cfg = dict(
    type='RobustTestLoop',
    attacks=dict(
        pgd50=dict(type='PGD', eps=8 / 255, alpha=2 / 255, steps=50),
        routepgd50=dict(type='RoutePGD', eps=8 / 255, alpha=2 / 255, steps=50),
        autoattack=dict(type='AutoAttack', eps=8 / 255),
    ),
    # AutoAttack costs most, and can only lower what the others have left standing.
    survivors_only=['autoattack'],
    worst_of=dict(ra=['pgd50', 'routepgd50']),
)
