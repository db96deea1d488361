_base_ = 'advmoe_resnet18_digits.py'

# The router objective and the schedule of the reference code, stabilised: a fixed expert per class, kept under attack,
# learnt on the batch that the experts have just learnt from; every attack is against class and router logits at once.
# Not the reference's: the bounded gate, which no attack uses, and a router that learns slower, with clipping.
model = dict(
    data_preprocessor=dict(attack=_base_.router_attack),
    router_loss=[dict(type='RouterLabelLoss', alpha=6.0, beta=6.0)],
)
train_cfg = dict(max_epochs=60, val_interval=10)
custom_hooks = [dict(type='AlternatingOptimHook', reuse_batch=True), *_base_.custom_hooks[1:]]
