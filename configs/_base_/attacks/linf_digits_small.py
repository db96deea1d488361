_base_ = 'linf_digits.py'

# L-inf, eps 0.1 on 8x8 digits: half of linf_digits.py, at which routes by groups of classes hold.
train_attack = dict(eps=0.1, alpha=0.0625)
router_attack = dict(eps=0.1, alpha=0.0625)
val_cfg = dict(attacks=dict(pgd10=dict(eps=0.1, alpha=0.025), routepgd10=dict(eps=0.1, alpha=0.025)))
test_cfg = dict(
    attacks=dict(
        pgd50=dict(eps=0.1, alpha=0.025, restarts=3),
        routepgd50=dict(eps=0.1, alpha=0.025),
        autoattack=dict(eps=0.1),
    ),
)
