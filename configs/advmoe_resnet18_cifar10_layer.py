_base_ = 'advmoe_resnet18_cifar10.py'

# A router for each expert layer, on that layer's own input, as in the figure of the paper.
model = dict(backbone=dict(routing='layer', router=dict(_delete_=True, type='LayerRouter')))
