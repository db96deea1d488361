_base_ = 'advmoe_resnet18-narrow_cifar10.py'

# The router objective of the paper alone: nothing asks for more than one expert.
model = dict(router_loss=[dict(type='TRADESLoss', beta=6.0)])
