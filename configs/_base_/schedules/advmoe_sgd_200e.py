# Training in turns: one optimizer for the experts, one for the router. The router learns slower and with
# bounded steps, because its first gradients are large.
optim_wrapper = dict(
    constructor='AlternatingOptimWrapperConstructor',
    experts=dict(
        type='OptimWrapper',
        optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=5e-4),
    ),
    router=dict(
        type='OptimWrapper',
        optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=5e-4),
        clip_grad=dict(max_norm=1.0),
    ),
)
param_scheduler = dict(
    experts=dict(type='CosineAnnealingLR', eta_min=0, by_epoch=True, convert_to_iter_based=True),
    router=dict(type='CosineAnnealingLR', eta_min=0, by_epoch=True, convert_to_iter_based=True),
)
# Every other batch is the router's: 100 epochs for each side.
train_cfg = dict(by_epoch=True, max_epochs=200, val_interval=10)
