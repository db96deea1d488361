_base_ = 'advmoe-groups2-small_convnet_fashion-mnist.py'

# Experts also learn from the images that an attack can send them: it tries each route, the routers decide.
model = dict(
    route='free',
    data_preprocessor=dict(attack=dict(_delete_=True, type='RoutePGD', eps=0.05, alpha=0.025, steps=4)),
)
