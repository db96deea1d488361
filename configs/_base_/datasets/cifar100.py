_base_ = 'cifar10.py'

# CIFAR-100: 45,000 images to train on, 5,000 of the training set to select on, the 10,000 official
# test images for the result.
data_root = 'data/cifar100'
train_dataloader = dict(dataset=dict(type='CIFAR100Split', data_root=data_root))
val_dataloader = dict(dataset=dict(type='CIFAR100Split', data_root=data_root))
test_dataloader = dict(dataset=dict(type='CIFAR100Split', data_root=data_root))
