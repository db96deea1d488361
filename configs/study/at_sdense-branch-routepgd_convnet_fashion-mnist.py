_base_ = 'at_sdense-branch_convnet_fashion-mnist.py'

# The training attack of advmoe-groups2-reachable_convnet_fashion-mnist.py: without routes, PGD that
# leaves out images which are wrong already and stops where one first is.
model = dict(data_preprocessor=dict(attack=dict(_delete_=True, type='RoutePGD', eps=0.05, alpha=0.025, steps=4)))
