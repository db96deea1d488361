_base_ = 'advmoe_resnet18_digits.py'

# MART in place of TRADES, in both turns; the attack of the experts' turn is PGD on the cross entropy.
model = dict(
    data_preprocessor=dict(attack=dict(_delete_=True, type='PGD', eps=0.2, alpha=0.05, steps=10)),
    robust_loss=dict(_delete_=True, type='MARTLoss', weight=5.0),
    router_loss=[dict(type='MARTLoss', weight=5.0), *_base_.router_loss[1:]],
)
