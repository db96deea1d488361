_base_ = 'advmoe_resnet18_digits.py'

# Madry's adversarial training in place of TRADES: cross entropy alone, of PGD images in the experts' turn, of those of
# TRADES' attack in the router's.
model = dict(
    data_preprocessor=dict(attack=dict(_delete_=True, type='PGD', eps=0.2, alpha=0.05, steps=10)),
    robust_loss=dict(_delete_=True, type='AdversarialCrossEntropyLoss'),
    router_loss=[dict(type='AdversarialCrossEntropyLoss'), *_base_.router_loss[1:]],
)
