_base_ = 'advmoe-groups_convnet_fashion-mnist.py'

# Shoes and bags against the rest: fewer groups, whose routes hold better.
groups = [
    ['Sandal', 'Sneaker', 'Ankle boot', 'Bag'],
    ['Trouser', 'Dress', 'T-shirt/top', 'Pullover', 'Coat', 'Shirt'],
]
model = dict(
    data_preprocessor=dict(router_attack=dict(groups=groups)),
    backbone=dict(num_experts=2),
    router_loss=dict(groups=groups),
)
