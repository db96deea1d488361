_base_ = 'at_sdense-branch2_convnet_fashion-mnist.py'

# The training attack of advmoe-groups2-small-reachable_convnet_fashion-mnist.py, which is PGD where there are no routes.
model = dict(data_preprocessor=dict(attack=dict(_delete_=True, type='RoutePGD', eps=0.05, alpha=0.025, steps=4)))
