# ViT-Small with 4 experts in the feed-forward network of every second block, one of which each token takes: what runs
# is as large as ViT-Small.
model = dict(
    type='RobustClassifier',
    data_preprocessor=dict(type='AdvDataPreprocessor', mode='pair'),
    backbone=dict(
        type='MoEBackbone',
        num_experts=4,
        include=[r'layers\.\d*[13579]\.ffn$'],
        routing='token',
        router=dict(type='TokenRouter', top_k=1),
        backbone=dict(
            type='VisionTransformer',
            arch=dict(embed_dims=384, num_layers=12, num_heads=6, feedforward_channels=1536),
            img_size=224,
            patch_size=16,
        ),
    ),
    neck=None,
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=384,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
    robust_loss=dict(type='TRADESLoss', beta=6.0),
)
# What keeps the routers of tokens in order, with the weights of their papers.
balance_loss = dict(type='RouterBalanceLoss', weight=0.01)
z_loss = dict(type='RouterZLoss', weight=0.001)
# What token routers learn in their turn: the paper's objective, that of the experts, and little beside it. Measured on
# digits: already with a RouterKLLoss of weight 1 they end at equal probabilities for all experts.
token_router_loss = [
    dict(type='TRADESLoss', beta=6.0),
    dict(type='RouterBalanceLoss', weight=0.1),
    dict(type='RouterKLLoss', weight=0.1),
    z_loss,
]
