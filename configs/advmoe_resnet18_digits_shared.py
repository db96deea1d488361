_base_ = 'advmoe_resnet18_digits.py'

# Cheaper: both sides learn from the same images and the same attack, which pushes the routes as well. 60 epochs, in
# which each side steps on every batch.
model = dict(data_preprocessor=dict(attack=_base_.router_attack))
train_cfg = dict(max_epochs=60, val_interval=10)
custom_hooks = [dict(type='AlternatingOptimHook', reuse_batch=True, reuse_attack=True), *_base_.custom_hooks[1:]]
