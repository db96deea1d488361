_base_ = 'advmoe-groups_convnet_fashion-mnist.py'

# The two groups that tools/analysis_tools/find_class_groups.py finds for AT(S-Dense): shoes against the rest.
groups = [
    ['Sandal', 'Sneaker', 'Ankle boot'],
    ['T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Shirt', 'Bag'],
]
model = dict(
    data_preprocessor=dict(router_attack=dict(groups=groups)),
    backbone=dict(num_experts=2),
    router_loss=dict(groups=groups),
)
