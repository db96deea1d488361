_base_ = 'advmoe_resnet18_digits.py'

# Training and evaluation in L2, at the eps that is about as hard as 0.2 in L-inf for networks trained in that.
_train = dict(norm='L2', eps=1.1, alpha=0.7)
_test = dict(norm='L2', eps=1.1, alpha=0.275)
model = dict(data_preprocessor=dict(attack=_train, router_attack=_train))
val_cfg = dict(attacks=dict(pgd10=_test, routepgd10=_test))
test_cfg = dict(attacks=dict(pgd50=_test, routepgd50=_test, autoattack=dict(norm='L2', eps=1.1)))
