_base_ = 'at_sparse_resnet18_digits_scores.py'

# Second stage: the weights, with the channels fixed. It starts from the first:
# --cfg-options load_from=<checkpoint of at_sparse_resnet18_digits_scores.py>
model = dict(stage='weights')
train_cfg = dict(max_epochs=60, val_interval=10)
