_base_ = 'advmoe-groups2-small-reachable_convnet_fashion-mnist.py'

# With shoes alone against the rest, experts also learn from the images that an attack can send them.
groups = [
    ['Sandal', 'Sneaker', 'Ankle boot'],
    ['T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Shirt', 'Bag'],
]
model = dict(data_preprocessor=dict(router_attack=dict(groups=groups)), router_loss=dict(groups=groups))
