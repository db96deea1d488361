_base_ = 'advmoe-groups2-branch_convnet_fashion-mnist.py'

# With that branch, experts also learn from the images that an attack can send them.
model = dict(
    route='free',
    data_preprocessor=dict(attack=dict(_delete_=True, type='RoutePGD', eps=0.05, alpha=0.025, steps=4)),
)
