_base_ = 'advmoe-groups_convnet_fashion-mnist.py'

# The groups of the reference code: class y goes to expert y mod 4.
model = dict(data_preprocessor=dict(router_attack=dict(groups='modulo')), router_loss=dict(groups='modulo'))
