_base_ = 'advmoe-groups2-branch-reachable_convnet_fashion-mnist.py'

# Each expert has a branch of its own, at no further cost of an image.
model = dict(backbone=dict(include=[r'network\.convs\.\d\.conv', '^branch$']))
