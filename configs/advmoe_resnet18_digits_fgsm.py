_base_ = 'advmoe_resnet18_digits.py'

# Cheaper: one step of 1.25 times the radius from a random start (arXiv:2001.03994), watched for catastrophic
# overfitting, which at this radius comes in every seed (docs/results.md).
_eps = 0.2
_attack = dict(type='PGD', eps=_eps, alpha=1.25 * _eps, steps=1)
model = dict(
    data_preprocessor=dict(attack=dict(_delete_=True, **_attack)),
    robust_loss=dict(_delete_=True, type='AdversarialCrossEntropyLoss'),
)
custom_hooks = [
    *_base_.custom_hooks,
    dict(type='CatastrophicOverfittingHook', attack=dict(type='PGD', eps=_eps, alpha=0.05, steps=10)),
]
