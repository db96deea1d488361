_base_ = 'at_sdense_convnet_fashion-mnist.py'

# Trained for as long as a mixture with 15 epochs for each side takes.
train_cfg = dict(max_epochs=36, val_interval=6)
