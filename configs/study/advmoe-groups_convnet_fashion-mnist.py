_base_ = 'advmoe_convnet_fashion-mnist.py'

# The router learns to tell apart groups of classes that an attack seldom confuses; experts learn with the route held.
groups = [
    ['Sandal', 'Sneaker', 'Ankle boot'],
    ['Trouser', 'Dress'],
    ['T-shirt/top', 'Pullover', 'Coat', 'Shirt'],
    ['Bag'],
]
model = dict(
    route='held',
    data_preprocessor=dict(
        attack=dict(route='held'),
        router_attack=dict(
            _delete_=True,
            type='ClassGroupAttack',
            groups=groups,
            classes='FashionMNIST',
            eps=0.05,
            alpha=0.025,
            steps=4,
        ),
    ),
    router_loss=dict(type='ClassGroupLoss', groups=groups, classes='FashionMNIST'),
)
