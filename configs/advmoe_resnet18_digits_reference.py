_base_ = 'advmoe_resnet18_digits_stabilised.py'

# The reference code to the letter: the gate is the raw logit, attacks go through it, the router learns as fast as the
# experts without clipping, and goes on normalising by the batch in the turn of the experts. Nothing bounds the
# router's logits; where they are no longer finite the run stops.
model = dict(
    backbone=dict(gate='logit'),
    data_preprocessor=dict(attack=dict(gated=True), router_attack=dict(gated=True)),
)
optim_wrapper = dict(router=dict(optimizer=dict(lr=0.1), clip_grad=None))
custom_hooks = [
    dict(type='AlternatingOptimHook', reuse_batch=True, fixed_in_eval=False),
    *_base_.custom_hooks[1:],
]
