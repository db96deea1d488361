_base_ = 'at_moe_resnet18_cifar100.py'

# Without adversarial images.
model = dict(
    _delete_=True,
    type='ImageClassifier',
    data_preprocessor=dict(type='ClsDataPreprocessor', mean=[0, 0, 0], std=[255, 255, 255]),
    backbone=_base_.model.backbone,
    neck=_base_.model.neck,
    head=_base_.model.head,
)
default_hooks = dict(checkpoint=dict(save_best='clean/accuracy/top1'))
# The routes that this hook watches are told by a RobustClassifier only.
custom_hooks = [hook for hook in _base_.custom_hooks if hook['type'] != 'RouterHealthHook']
