_base_ = 'at_moe_convnet_fashion-mnist.py'

# Groups of classes without turns: experts and router learn from the same attacked images, whose attack is on both.
groups = [
    ['Sandal', 'Sneaker', 'Ankle boot'],
    ['Trouser', 'Dress'],
    ['T-shirt/top', 'Pullover', 'Coat', 'Shirt'],
    ['Bag'],
]
model = dict(
    route='held',
    data_preprocessor=dict(attack=dict(router_weight=1.0)),
    robust_loss=[
        dict(type='TRADESLoss', beta=6.0),
        dict(type='ClassGroupLoss', groups=groups, classes='FashionMNIST'),
    ],
)
