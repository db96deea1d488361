_base_ = 'advmoe-groups_convnet_fashion-mnist.py'

# The four groups that tools/analysis_tools/find_class_groups.py finds for AT(S-Dense).
groups = [
    ['Sandal', 'Sneaker', 'Ankle boot'],
    ['Trouser'],
    ['T-shirt/top', 'Pullover', 'Dress', 'Coat', 'Shirt'],
    ['Bag'],
]
model = dict(data_preprocessor=dict(router_attack=dict(groups=groups)), router_loss=dict(groups=groups))
