_base_ = 'cifar10_batched.py'

# CIFAR-10 as image files in train/<class>/ and test/<class>/, split as the official files are.
data_root = 'data/cifar10_images'
_images = dict(type='ImageFolders', data_root=data_root)
train_dataloader = dict(dataset=dict(dataset=_images))
val_dataloader = dict(dataset=_images)
test_dataloader = dict(dataset=_images)
