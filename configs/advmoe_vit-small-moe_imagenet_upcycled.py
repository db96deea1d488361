_base_ = 'advmoe_vit-small-moe_imagenet.py'

# Fine-tuning from MMPretrain's DeiT-Small: its feed-forward networks become the 4 experts each, so that training
# starts from what the dense network computes. The normalisation is the one it was trained with.
load_dense = 'https://download.openmmlab.com/mmclassification/v0/deit/deit-small_pt-4xb256_in1k_20220218-9425b9bb.pth'
model = dict(
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375]),
    backbone=dict(backbone=dict(init_cfg=dict(type='Pretrained', checkpoint=load_dense, prefix='backbone.'))),
    head=dict(type='VisionTransformerClsHead', init_cfg=dict(type='Pretrained', checkpoint=load_dense, prefix='head.')),
)
optim_wrapper = dict(experts=dict(optimizer=dict(lr=5e-5)), router=dict(optimizer=dict(lr=5e-4)))
train_cfg = dict(max_epochs=20, val_interval=1)
