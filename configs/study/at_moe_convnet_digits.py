_base_ = 'advmoe_convnet_digits.py'

# Joint training: every parameter in every iteration.
model = dict(data_preprocessor=dict(router_attack=None))
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.2, momentum=0.9, nesterov=True, weight_decay=5e-4),
    clip_grad=dict(max_norm=5.0),
)
train_cfg = dict(max_epochs=160, val_interval=20)
custom_hooks = _base_.custom_hooks[1:]
