_base_ = 'cifar10_images_batched.py'

# A part of CIFAR-10 for two CPU cores, the same share of each class: 8,000 images to train on, 1,000 to select on and
# 1,000 to test on.
train_dataloader = dict(
    batch_size=64,
    dataset=dict(dataset=dict(indices=[i * 45 // 8 for i in range(8000)])),
)
val_dataloader = dict(num_workers=0, dataset=dict(indices=[*range(0, 5000, 5)]))
test_dataloader = dict(num_workers=0, dataset=dict(indices=[*range(0, 10000, 10)]))
auto_scale_lr = dict(base_batch_size=64)
